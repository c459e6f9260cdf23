"""The script that prints a SLURM job: what it reads of a run's options, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/render_slurm.py"


def _render(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_job_looks_where_its_run_is(prefix):
    """Catches a job that reads another directory than its run writes, and so takes it for not begun."""
    job = _render(f"{prefix}run_name=mine", f"{prefix}output_dir=there")
    assert job.returncode == 0 and "\ndirectory=there/mine\n" in job.stdout and "--job-name=mine\n" in job.stdout


@pytest.mark.parametrize("option", ["--gpus-per-node", "--nodes", "--grace"])
def test_numbers_below_zero_are_refused(option):
    """Catches a job that SLURM refuses, or that starts no process."""
    job = _render(option, "-2", "--processes-per-node", "2", "run_name=mine")
    assert job.returncode == 2 and f"{option}: must" in job.stderr
