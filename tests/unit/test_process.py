"""This process among those of its launcher, and what it says and does at an end."""

import os
import subprocess
import sys
import threading

import pytest

from moe_lm import process


@pytest.mark.parametrize(
    ("environment", "rank", "world_size", "signature"),
    [
        ({}, 0, 1, "moe-lm"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3, 4, "moe-lm (rank 3)"),
        ({"RANK": "one", "WORLD_SIZE": "-2"}, 0, 1, "moe-lm"),  # refused later, in a sentence that begins so
    ],
)
def test_the_launcher_says_which_process_this_is(monkeypatch, environment, rank, world_size, signature):
    """Catches a process without a launcher that takes itself for one of many, and a sentence without a name."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process.rank(), process.world_size(), process.signature()) == (rank, world_size, signature)


@pytest.mark.parametrize(("count", "again"), [(None, False), ("0", False), ("2", True)])
def test_a_first_start_is_no_restart(monkeypatch, count, again):
    """Catches a first start by torchrun, which gives the count as well, that is taken for another one."""
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if count is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert process.was_restarted() is again


@pytest.mark.parametrize("reader", ["there", "gone"])
def test_a_sentence_needs_no_reader(reader):
    """Catches an end that is held up because nobody reads the error output, or by a name that can not be encoded."""
    said = [sys.executable, "-c", r"from moe_lm.process import say; say('a \udcff name'); print('went on')"]
    read, write = os.pipe()
    if reader == "gone":
        os.close(read)
    went_on = subprocess.run(said, stdout=subprocess.PIPE, stderr=write, text=True, check=True).stdout
    os.close(write)
    assert went_on == "went on\n"
    if reader == "there":
        with open(read, "rb") as file:
            assert file.read() == b"\nmoe-lm: a \\udcff name\n"


def test_an_attempt_is_given_up_in_time():
    """Catches an end that waits for a dead mount."""
    over, done = threading.Event(), []
    process.attempt(lambda: done.append(over.wait(30)), 0.05)
    assert done == []
    over.set()
    process.attempt(lambda: done.append("in time"), 30)
    assert "in time" in done
