"""SIGKILL at random times: the run ends with the bytes of the one that was never interrupted, sample for sample."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.faults.forks import FULL
from tests.runs import TINY, final_tensors, metrics, prepare

OPTIONS = [
    *TINY,
    "data=prepared",
    "data.paths=[prepared]",
    "trainer.max_steps=100",
    "trainer.eval_interval=8",
    "finish.export=false",
]
KILLS = 200 if FULL else 4


@pytest.fixture(scope="module")
def whole(parent, tmp_path_factory):
    """A directory with a corpus and one uninterrupted run, and how long it took."""
    directory = tmp_path_factory.mktemp("kills")
    prepare(directory)
    ledger, log = directory / "whole.ledger", directory / "whole.log"
    begin = time.monotonic()
    assert parent.run("pretrain", [*OPTIONS, "run_name=whole"], directory, ledger, log=log) == 0, log.read_text()
    return directory, time.monotonic() - begin


def _consumed(ledger: Path) -> list[tuple[int, str]]:
    """The samples that the weights have seen: each resume takes back what came after its checkpoint."""
    lineage: list[tuple[int, str]] = []
    for line in ledger.read_text().splitlines():
        entry = json.loads(line)
        assert entry["step"] <= len(lineage) + 1, f"step {entry['step']} after {len(lineage)}: some were skipped"
        del lineage[entry["step"] - 1 :]
        lineage.append((entry["data_step"], entry["samples"]))
    return lineage


def test_kills_at_random_times_change_nothing(parent, whole, figure):
    """Catches any state that a checkpoint misses, a save that a kill breaks, a resume that is killed at once: runs are
    killed at random times, again and again, until they end, and some within a second of a resume; weights, moments,
    losses and the ledger of samples equal the uninterrupted run's in every case."""
    directory, seconds = whole
    generator = random.Random(20261124)
    reference, expected = final_tensors(directory / "runs/whole"), _consumed(directory / "whole.ledger")
    assert len(expected) == 100 and len(set(expected)) == 100
    kills = runs = soon = 0
    while kills < KILLS:
        runs += 1
        run, ledger, log = (directory / name for name in (f"runs/r{runs}", f"r{runs}.ledger", f"r{runs}.log"))
        while True:
            pid = parent.start("pretrain", [*OPTIONS, f"run_name=r{runs}"], directory, ledger, log=log)
            begun, after_resume = len(log.read_text()), generator.random() < 0.3
            if after_resume:
                while "resumed" not in log.read_text()[begun:] and "step 1/" not in log.read_text()[begun:]:
                    if _ended(pid):
                        break
                    time.sleep(0.005)
            deadline = time.monotonic() + generator.uniform(0, 1.0 if after_resume else 1.1 * seconds)
            while time.monotonic() < deadline and not _ended(pid):
                time.sleep(0.005)
            if _ended(pid):
                assert parent.wait(pid) == 0, log.read_text()[-3000:]
                break
            os.kill(pid, signal.SIGKILL)
            if parent.wait(pid) == 0:
                break
            kills += 1
            soon += after_resume and "resumed" in log.read_text()[begun:]
        ours = final_tensors(run)
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[name], reference[name]) for name in ours), (runs, log.read_text())
        assert _consumed(ledger) == expected, runs
        for name in ("loss", "validation_bits_per_byte"):
            assert metrics(run, name) == metrics(directory / "runs/whole", name), (runs, name)
        shutil.rmtree(run)
    figure(
        f"SIGKILL at random times: {kills} kills over {runs} runs ({soon} within a second of a resume), weights, "
        f"moments and losses equal in {runs} of {runs}; ledger: 0 samples repeated, 0 skipped"
    )


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
