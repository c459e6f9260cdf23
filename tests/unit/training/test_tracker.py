"""A tracker that raises, hangs, dies or is too slow, behind its wall; and wandb itself, offline.

The tracker's process is the real one. In place of Accelerate it finds a package of that name whose tracker does what a
test says.
"""

import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_lm.training import tracker as tracker_module
from moe_lm.training.config import TrackerConfig, TrackerMode, TrackerName
from moe_lm.training.sinks import MetricsFile
from moe_lm.training.tracker import Tracker

WANDB = TrackerConfig(name=TrackerName.wandb, mode=TrackerMode.offline)

FAKE = """
import json, os, pathlib, signal, sys, time

directory = pathlib.Path(__file__).parents[1]

class WandBTracker:
    def __init__(self, project, **options):
        self.tracker = None

    def call(self, name, *details):
        with (directory / "calls").open("a") as calls:
            print(json.dumps([name, *details]), file=calls)
        place, deed = json.loads((directory / "breaks").read_text())
        if name == place:
            eval(deed)

    def raises(self):
        raise RuntimeError("the server\\nis gone")

    def start(self):
        self.call("start")

    def store_init_configuration(self, values):
        self.call("init", values)

    def log(self, values, step):
        self.call("log", values, step)

    def finish(self):
        self.call("finish")
"""
RAISES = "self.raises()"
HANGS = "time.sleep(3600)"
STOPS = "os.kill(os.getpid(), signal.SIGSTOP)"
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
LEAVES = "sys.exit('that is enough')"


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Trackers that do something at a place; what they were called with is in `calls`."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/__init__.py").write_text("def PartialState(cpu): pass\n")
    (tmp_path / "accelerate/tracking.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(place: str, deed: str) -> Tracker:
        (tmp_path / "breaks").write_text(json.dumps([place, deed]))
        return Tracker(True, WANDB, tmp_path, "run", {"seed": 1})

    return make


def _calls(directory: Path) -> list[list]:
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


def _wait_until_gone(tracker: Tracker) -> None:
    """Nothing of a tracker is left: neither its process nor its thread."""
    tracker._thread.join(10)
    assert not tracker._thread.is_alive() and tracker._process.poll() is not None


def _train(tracker: Tracker, directory: Path, steps: int) -> float:
    """Log as a run does; return the seconds that all steps together waited."""
    file, waited = MetricsFile(directory / "metrics.jsonl", 0), 0.0
    for step in range(1, steps + 1):
        file.write({"step": step})
        start = time.monotonic()
        tracker.log({"loss": 1.0}, step)
        waited += time.monotonic() - start
    file.close()
    written = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert written == [{"step": step} for step in range(1, steps + 1)]
    return waited


@pytest.mark.parametrize("place", ["start", "init", "log", "finish"])
@pytest.mark.parametrize(
    "deed, said", [(RAISES, "the server is gone"), (DIES, "its process has ended"), (LEAVES, "that is enough")]
)
def test_a_broken_tracker_is_switched_off_with_one_line(broken, tmp_path, capsys, place, deed, said):
    """Catches a tracker that stops training, that complains at every step, or that takes metrics.jsonl with it."""
    tracker = broken(place, deed)
    _train(tracker, tmp_path, 50)
    tracker.close()
    assert capsys.readouterr().err == f"tracker switched off, metrics.jsonl goes on: {said}\n"
    names = [name for name, *_ in _calls(tmp_path)]
    assert names[-1] == place and names.count(place) == 1
    _wait_until_gone(tracker)


@pytest.mark.parametrize("deed", [HANGS, STOPS])
@pytest.mark.parametrize("place", ["start", "log", "finish"])
def test_a_tracker_that_hangs_is_left(broken, tmp_path, capsys, monkeypatch, place, deed):
    """Catches a step or an end that waits for a tracker that does not answer, with more lines than a pipe holds."""
    monkeypatch.setattr(tracker_module, "CLOSE_SECONDS", 2.0)
    tracker = broken(place, deed)
    assert _train(tracker, tmp_path, 5000) < 60  # it hangs for an hour
    tracker.close()
    assert capsys.readouterr().err.startswith(
        "tracker switched off, metrics.jsonl goes on: not done 2 s after training"
    )
    _wait_until_gone(tracker)
    assert capsys.readouterr().err == ""


def test_lines_arrive_in_order(broken, tmp_path, capsys):
    """Catches lines that overtake each other, are lost, or carry a list that a tracker draws nothing of."""
    tracker = broken("nowhere", "")
    for step in range(1, 301):
        tracker.log({"step": step, "loss": 2.0, "applied": True, "expert_counts": [[1, 2]], "name": "x"}, step)
    tracker.close()
    lines = [["log", {"step": step, "loss": 2.0, "applied": True}, step] for step in range(1, 301)]
    assert _calls(tmp_path) == [["start"], ["init", {"seed": 1}], *lines, ["finish"]]
    assert capsys.readouterr().err == ""
    _wait_until_gone(tracker)


def test_lines_that_do_not_fit_the_queue_are_counted(broken, tmp_path, capsys, monkeypatch):
    """Catches a queue that grows without end behind a slow tracker, and a loss that nobody is told of."""
    monkeypatch.setattr(tracker_module, "QUEUE_LINES", 10)
    tracker = broken("start", "[time.sleep(0.01) for _ in iter((directory / 'go').exists, True)]")
    assert _train(tracker, tmp_path, 30) < 60
    (tmp_path / "go").touch()
    tracker.close()
    assert [step for name, *_, step in _calls(tmp_path)[2:-1]] == list(range(1, 11))
    assert capsys.readouterr().err == "tracker: 20 lines came too fast for it; metrics.jsonl has them\n"


@pytest.mark.parametrize("config, main", [(TrackerConfig(), True), (WANDB, False)])
def test_no_tracker_is_asked_for(tmp_path, config, main):
    """Catches a tracker that is started, or leaves files, although `tracker=none` or on another rank."""
    tracker = Tracker(main, config, tmp_path, "run", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_closing_leaves_the_processes_connected(broken, tmp_path):
    """Catches accelerate's `end_training`, which destroys the process group: the next barrier would fail or hang."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        broken("nowhere", "").close()
        assert _calls(tmp_path)[-1] == ["finish"] and dist.is_initialized()
        dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_damaged_tracker_id_does_not_stop_the_run(tmp_path, capsys):
    """Catches a file of the tracker, outside of the tracker, that ends training."""
    (tmp_path / "tracker.json").write_text('{"id"')
    tracker = Tracker(True, WANDB, tmp_path, "run", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert capsys.readouterr().err.startswith("tracker switched off, metrics.jsonl goes on: ")


def test_wandb_keeps_its_id_over_a_resume(tmp_path, monkeypatch, capsys):
    """Catches a resumed run that draws a second set of curves, and a tracker that waits for the peers of a launched
    process: with wandb itself, offline.
    """
    monkeypatch.setattr(tracker_module, "CLOSE_SECONDS", 100)  # its imports alone take seconds
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for step in (1, 2):
        tracker = Tracker(True, WANDB, tmp_path, "some-run", {"seed": 1})
        tracker.log({"loss": 1.0 / step}, step)
        tracker.close()
    assert capsys.readouterr().err == ""
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
    online = TrackerConfig(name=TrackerName.wandb, mode=TrackerMode.online)
    tracker = Tracker(True, online, tmp_path, "run", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    said = capsys.readouterr().err
    assert said.startswith("tracker switched off, metrics.jsonl goes on: nobody is logged in") and said.count("\n") == 1
