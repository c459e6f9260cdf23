"""metrics.jsonl: whole lines, in order, and none twice after a resume."""

import json
import os
from pathlib import Path

import pytest

from moe_lm.training.sinks import MetricsFile


def _line(step: int, **values: float) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def _resume(path: Path, step: int) -> str:
    MetricsFile(path, resume_step=step).close()
    return path.read_text()


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    """Catches figures that stay in a buffer and are lost with a kill."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    file.write({"step": 1, "loss": 2.5})
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n'
    file.write({"step": 2, "expert_counts": [[1, 2]]})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    file.close()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 99])
def test_resuming_cuts_back_to_the_step(tmp_path, step):
    """Catches steps that stand twice after a resume, or are lost; several lines of one step (validation) stay."""
    path = tmp_path / "metrics.jsonl"
    lines = [_line(1, loss=3.0), _line(2, loss=2.0), _line(2, validation=1.5), _line(4, loss=1.0)]
    path.write_text("".join(lines))
    assert _resume(path, step) == "".join(line for line in lines if json.loads(line)["step"] <= step)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("length", range(1, len(_line(3, loss=0.5))))
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, length):
    """Catches half a line, at any place, that the next line is written onto; also one that lacks only its end."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1) + _line(2) + _line(3, loss=0.5)[:length])
    file = MetricsFile(path, resume_step=9)
    file.write({"step": 3})
    file.close()
    assert path.read_text() == _line(1) + _line(2) + _line(3)


@pytest.mark.parametrize(
    "line", ["null\n", "3\n", "[]\n", "{}\n", '{"step": "x"}\n', '{"step": null}\n', "\n", "\0\0\0\n"]
)
def test_a_line_without_a_step_is_dropped(tmp_path, line):
    """Catches a resume that fails on a line of zeros, as some file systems leave after a crash."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1) + line + _line(2))
    assert _resume(path, 2) == _line(1) + _line(2)


def test_a_full_disk_loses_no_line(tmp_path, monkeypatch, capsys):
    """Catches a run that ends because its figures can not be written, or lines lost, torn or doubled meanwhile: the
    disk takes seven bytes of a line, then nothing for a while."""
    path = tmp_path / "metrics.jsonl"
    file, original, room = MetricsFile(path, 0), os.write, [7]

    def write(descriptor, content):
        if room[0] is None:
            return original(descriptor, content)
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken, room[0] = room[0], 0
        return original(descriptor, content[:taken])

    monkeypatch.setattr(os, "write", write)
    for step in (1, 2, 3):
        file.write({"step": step})
    assert path.read_bytes() == _line(1)[:7].encode() and capsys.readouterr().err.count("No space left") == 1
    file.cut_back(2)
    assert path.read_text() == _line(1) + _line(2)
    room[0] = 3
    file.write({"step": 3})
    room[0] = None
    file.write({"step": 4})
    file.close()
    assert path.read_text() == "".join(map(_line, (1, 2, 3, 4)))


def test_a_file_in_order_is_left_alone(tmp_path):
    """Catches a needless rewrite, which a kill could interrupt."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1) + _line(2))
    before = path.stat().st_ino
    assert _resume(path, 2) == _line(1) + _line(2)
    assert path.stat().st_ino == before
