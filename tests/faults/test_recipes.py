"""The recipes of docs/reliability.md: a launcher that restarts a run which was killed, and a batch job that goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import ENVIRONMENT, TINY, children_of, final_tensors, metrics, moe_lm, prepare, wait_for

OPTIONS = [
    *TINY,
    "data=prepared",
    "data.paths=[prepared]",
    "trainer.max_steps=60",
    "trainer.micro_batch_size=6",
    "finish.export=false",
]
pytestmark = pytest.mark.full

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with an uninterrupted run of two processes."""
    directory = tmp_path_factory.mktemp("recipes")
    prepare(directory)
    moe_lm("pretrain", *OPTIONS, "run_name=whole", cwd=directory, launcher=TORCHRUN)
    return directory


def _wait_for_steps(run: Path, number: int) -> None:
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= number)


def _assert_whole(run: Path, whole: Path) -> None:
    assert json.loads((run / "state.json").read_text())["status"] == "finished"
    ours, theirs = final_tensors(run), final_tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and metrics(run) == metrics(whole)


def test_torchrun_restarts_a_run_that_was_killed(whole):
    """Catches a restart that does not go on, or not as the same run: SIGKILL to one of two processes."""
    command = [*TORCHRUN, "--max-restarts", "3", "-m", "moe_lm", "pretrain", *OPTIONS, "run_name=killed"]
    run = whole / "runs/killed"
    with (whole / "killed.log").open("w") as log:
        process = subprocess.Popen(command, cwd=whole, env=ENVIRONMENT, stdout=log, stderr=log)
        _wait_for_steps(run, 9)
        os.kill(children_of(process.pid, "moe_lm")[1], signal.SIGKILL)
        assert process.wait(timeout=100) == 0, (whole / "killed.log").read_text()[-3000:]
    assert "resumed runs/killed/checkpoints/step-" in (whole / "killed.log").read_text()
    _assert_whole(run, whole / "runs/whole")


def test_the_slurm_job_is_requeued_until_its_run_is_finished(whole):
    """Catches a batch job that ends with its time limit: SIGTERM as SLURM sends it, `scontrol requeue`, and a second
    start that finishes. `srun` and `scontrol` are stand-ins, for there is no SLURM here."""
    bin_directory, calls = whole / "bin", whole / "calls"
    bin_directory.mkdir()
    stand_ins = {
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"',
        "scontrol": f'[ "$1" = requeue ] && echo "$@" >> {calls} || echo localhost',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, line in stand_ins.items():
        (bin_directory / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_directory / name).chmod(0o755)
    path = f"{bin_directory}:{os.environ['PATH']}"
    environment = {**ENVIRONMENT, "PATH": path, "SLURM_JOB_ID": "42"}
    render = [sys.executable, Path(__file__).parents[2] / "scripts/render_slurm.py"]
    resources = ["--gpus-per-node", "0", "--processes-per-node", "2"]
    script = whole / "job.sh"
    script.write_text(subprocess.check_output([*render, *resources, *OPTIONS, "run_name=job"], text=True))
    command, run = ["bash", script], whole / "runs/job"
    log = (whole / "job.log").open("w")
    process = subprocess.Popen(command, cwd=whole, env=environment, stdout=log, stderr=log)
    _wait_for_steps(run, 9)
    (launcher,) = children_of(process.pid, "torch.distributed.run")
    os.kill(launcher, signal.SIGTERM)
    assert process.wait(timeout=100) == 0, (whole / "job.log").read_text()[-3000:]
    assert json.loads((run / "state.json").read_text())["status"] == "stopped"
    assert calls.read_text() == "requeue 42\n"
    assert subprocess.run(command, cwd=whole, env=environment, stdout=log, stderr=log, timeout=100).returncode == 0
    assert calls.read_text() == "requeue 42\n", "a finished run is not requeued"
    _assert_whole(run, whole / "runs/whole")
