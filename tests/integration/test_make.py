"""The Makefile, with a stand-in for pip and python where a real installation would take minutes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *"-m venv"*) mkdir -p .venv/bin; cp "{self}" .venv/bin/python; cp "{self}" .venv/bin/moe-lm;; esac
"""


@pytest.fixture
def checkout(tmp_path):
    """The files that make reads, and a Python that only writes down what it is asked to do."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    python = tmp_path / "python-stand-in"
    python.write_text(STAND_IN.format(log=tmp_path / "log", self=python))
    python.chmod(0o755)
    return tmp_path


def _make(checkout: Path, *targets: str) -> list[str]:
    """Run make; return the commands that it gave to Python since the last call."""
    log = checkout / "log"
    log.write_text("")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "ARGS"}
    command = ["make", f"PYTHON={checkout / 'python-stand-in'}", *targets]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, env=environment)
    return log.read_text().splitlines()


def test_targets_set_up_once_and_again_only_when_pins_change(checkout):
    """Catches an installation that runs every time, or not at all after a dependency changed."""
    first = _make(checkout, "train", "ARGS=trainer.max_steps=1")
    assert [line.split()[:2] for line in first] == [["-m", "venv"], ["-m", "pip"], ["pretrain", "trainer.max_steps=1"]]
    assert "-c constraints.txt" in first[1]
    assert _make(checkout, "train") == ["pretrain"]
    assert [line.split()[:2] for line in _make(checkout, "test")] == [["-m", "pytest"]]
    os.utime(checkout / "constraints.txt", (2**32, 2**32))
    assert any("-m pip" in line for line in _make(checkout, "test"))


def test_make_alone_lists_the_targets(checkout):
    """Catches a first target that does something, or a target without a word about it."""
    done = subprocess.run(["make"], cwd=checkout, capture_output=True, text=True, check=True)
    assert all(f"make {name}" in done.stdout for name in ("train", "test", "lint", "format", "clean"))
    assert not (checkout / ".venv").exists()
