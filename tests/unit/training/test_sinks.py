"""Where figures go: metrics.jsonl in every case, and a tracker that can neither stop nor lose anything."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from moe_lm.training.config import TrackerConfig, TrackerMode, TrackerName
from moe_lm.training.sinks import MetricsFile, Tracker

WANDB = TrackerConfig(name=TrackerName.wandb, mode=TrackerMode.offline)


def _line(step: int, **values: float) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def _resume(path: Path, step: int) -> str:
    MetricsFile(path, resume_step=step).close()
    return path.read_text()


# metrics.jsonl


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


def test_a_file_in_order_is_left_alone(tmp_path):
    """Catches a needless rewrite, which a kill could interrupt."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1) + _line(2))
    before = path.stat().st_ino
    assert _resume(path, 2) == _line(1) + _line(2)
    assert path.stat().st_ino == before


# Trackers


class BrokenTracker(GeneralTracker):
    """A tracker of accelerate that works until a method named `broken` is called."""

    name = "broken"
    requires_logging_directory = False
    tracker = None

    def __init__(self, broken: str):
        super().__init__()
        self.broken, self.calls, self.logged = broken, [], []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.broken:
            raise RuntimeError(f"{name}: the server is gone")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("init")

    def log(self, values, step=None, **kwargs):
        self._call("log")
        self.logged.append((step, values))

    def finish(self):
        self._call("finish")


def _tracker(broken: str, directory: Path) -> tuple[Tracker, BrokenTracker]:
    behind = BrokenTracker(broken)
    accelerator = Accelerator(cpu=True, log_with=behind)
    return Tracker(accelerator, WANDB, directory, "run", {"seed": 1}), behind


@pytest.mark.parametrize("broken", ["start", "init", "log", "finish"])
def test_a_broken_tracker_is_switched_off_and_metrics_go_on(tmp_path, capsys, broken):
    """Catches a tracker that stops training, that complains at every step, or that takes metrics.jsonl with it."""
    tracker, behind = _tracker(broken, tmp_path)
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        file.write({"step": step})
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    file.close()
    said = capsys.readouterr().err
    assert said == f"tracker switched off, metrics.jsonl goes on: {broken}: the server is gone\n"
    assert behind.calls[-1] == broken and behind.calls.count(broken) == 1
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(map(_line, (1, 2, 3)))


def test_a_tracker_gets_numbers_only(tmp_path):
    """Catches lists of expert counts sent to a tracker, which draws nothing of them, or figures at the wrong step."""
    tracker, behind = _tracker("nothing", tmp_path)
    tracker.log({"step": 7, "loss": 2.0, "expert_counts": [[1, 2]], "name": "x"}, 7)
    tracker.close()
    assert behind.logged == [(7, {"step": 7, "loss": 2.0})]
    assert behind.calls == ["start", "init", "log", "finish"]


def test_no_tracker_is_asked_for_by_default(tmp_path):
    """Catches a tracker that is started, or leaves files, although `tracker=none`."""
    behind = BrokenTracker("nothing")
    tracker = Tracker(Accelerator(cpu=True, log_with=behind), TrackerConfig(), tmp_path, "run", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert behind.calls == [] and not list(tmp_path.iterdir())


def test_closing_leaves_the_processes_connected(tmp_path):
    """Catches accelerate's `end_training`, which destroys the process group: the next barrier would fail or hang."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        tracker, behind = _tracker("nothing", tmp_path)
        tracker.close()
        assert behind.calls[-1] == "finish" and dist.is_initialized()
        dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_damaged_tracker_id_does_not_stop_the_run(tmp_path, capsys):
    """Catches a file of the tracker, outside of the tracker, that ends training."""
    (tmp_path / "tracker.json").write_text('{"id"')
    tracker, _ = _tracker("nothing", tmp_path)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert capsys.readouterr().err.startswith("tracker switched off, metrics.jsonl goes on: ")


def test_wandb_keeps_its_id_over_a_resume(tmp_path, monkeypatch):
    """Catches a resumed run that draws a second set of curves: with wandb itself, offline."""
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for step in (1, 2):
        tracker = Tracker(Accelerator(cpu=True, log_with="wandb"), WANDB, tmp_path, "some-run", {"seed": 1})
        tracker.log({"loss": 1.0 / step}, step)
        tracker.close()
    identity = json.loads((tmp_path / "tracker.json").read_text())["id"]
    assert identity.startswith("some-run-")
    # One directory for each start; wandb numbers those of the same second.
    assert {p.name for p in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")} == {f"run-{identity}.wandb"}
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}*"))) == 2


def test_a_tracker_without_a_login_never_asks(tmp_path, monkeypatch, capsys):
    """Catches a run that waits at a question on the terminal: without a login, online tracking is off with one line."""
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    accelerator = Accelerator(cpu=True, log_with="wandb")
    online = TrackerConfig(name=TrackerName.wandb, mode=TrackerMode.online)
    tracker = Tracker(accelerator, online, tmp_path, "run", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert "tracker switched off" in capsys.readouterr().err and not accelerator.trackers
