"""Real runs with a tracker that loses its helper process, its own process, or the network."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT, TINY, children_of, metrics, wait_for, write_corpus

STEPS = 60
OPTIONS = [*TINY, "data.paths=corpus", "run_name=run", "tracker=wandb", f"trainer.max_steps={STEPS}"]
OFF = "tracker switched off, metrics.jsonl goes on: "


@contextmanager
def _run(directory: Path, *options: str, **environment: str):
    """A run in a process of its own; after the block it must have ended well, with every step in metrics.jsonl."""
    write_corpus(directory / "corpus")
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_lm", "pretrain", *OPTIONS, *options],
        cwd=directory,
        env=ENVIRONMENT | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert sorted(metrics(directory / "runs/run")) == list(range(1, STEPS + 1))
    assert (directory / "runs/run/hf/model.safetensors").exists()


def _child(pid: int, word: str) -> int:
    """Wait for a process to start one with a word in its command line."""
    found: list[int] = []

    def is_there() -> bool:
        try:
            found.extend(children_of(pid, word))
        except FileNotFoundError:  # a thread or process that has just ended
            found.clear()
        return bool(found)

    wait_for(is_there)
    return found[0]


@pytest.mark.parametrize("victim", ["wandb-core", pytest.param("tracker_process", marks=pytest.mark.full)])
def test_a_killed_helper_does_not_reach_training(tmp_path, victim):
    """Catches a killed helper process that makes a step, the export or the end of the run raise, or hang."""
    with _run(tmp_path, "tracker.mode=offline") as process:
        own = _child(process.pid, "tracker_process")
        os.kill(own if victim == "tracker_process" else _child(own, victim), signal.SIGKILL)
        said = process.stderr.read()
    assert said.count(OFF) == 1 and "Traceback" not in said


@pytest.mark.full
def test_no_network_delays_nothing(tmp_path):
    """Catches a start, a step or an end that waits for a server that can not be reached."""
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
    with _run(tmp_path, "tracker.mode=online", **nowhere) as process:
        wait_for(lambda: (tmp_path / "runs/run/metrics.jsonl").exists())
        start = time.monotonic()
        wait_for(lambda: len(metrics(tmp_path / "runs/run")) == STEPS)
        trained = time.monotonic() - start
        said = process.stderr.read()
        ended = time.monotonic() - start
    assert said.count(OFF) == 1 and "Traceback" not in said
    # wandb tries to log in for 10 s, of which training takes no notice; then it is left, 15 s after training at most.
    assert trained < 10 and ended - trained < 25
