"""Saving behind training: a copy of the state, one save at a time, failures that are heard."""

import errno
import threading

import pytest
import torch

import moe_lm.checkpoint.saver as saver_module
from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig, FailurePolicy
from moe_lm.checkpoint.saver import Saver
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(saver_module, "PAUSES", (0.001, 0.001))
    monkeypatch.setattr(saver_module, "LATER_PAUSE", 0.001)


def _wait(saver: Saver) -> None:
    while saver.busy:
        saver._thread.join(1)


def test_what_is_saved_is_the_state_at_the_start(store, monkeypatch):
    """Catches a thread that writes what training has changed meanwhile: the tensor is overwritten while it waits."""
    held, original = threading.Event(), store.save
    monkeypatch.setattr(store, "save", lambda *arguments: (held.wait(), original(*arguments)))
    saver, tensor = Saver(store, pytest.fail), torch.ones(5)
    saver.start(1, [TensorSlice.whole("t", tensor)], {})
    tensor.zero_()
    assert saver.busy and store.paths() == []
    held.set()
    _wait(saver)
    assert saver.failure is None and torch.equal(Checkpoint(store.path(1)).tensor("t"), torch.ones(5))


def test_a_second_save_never_overtakes_the_first(store, monkeypatch):
    """Catches two saves at a time: the second is refused while the first is under way."""
    held, original = threading.Event(), store.save
    monkeypatch.setattr(store, "save", lambda *arguments: (held.wait(), original(*arguments)))
    saver = Saver(store, pytest.fail)
    saver.start(1, [TensorSlice.whole("t", torch.ones(1))], {})
    with pytest.raises(AssertionError):
        saver.start(2, [TensorSlice.whole("t", torch.ones(1))], {})
    held.set()
    _wait(saver)
    assert [path.name for path in store.paths()] == ["step-00000001"]


def _failing(store, monkeypatch, times: int, error: Exception) -> list[int]:
    tries, original = [], store.save

    def save(*arguments):
        tries.append(len(tries))
        if len(tries) <= times:
            raise error
        return original(*arguments)

    monkeypatch.setattr(store, "save", save)
    return tries


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE])
def test_a_failure_is_said_and_tried_again(store, monkeypatch, number):
    """Catches a failure that only a log of another thread knows of, or that is final at once."""
    said: list[str] = []
    tries = _failing(store, monkeypatch, 2, OSError(number, "the reason", "the/file"))
    saver = Saver(store, said.append)
    saver.start(7, [TensorSlice.whole("t", torch.ones(1))], {})
    _wait(saver)
    assert saver.failure is None and len(tries) == 3 and store.path(7).exists()
    assert "checkpoint of step 7 can not be written (the/file: the reason)" in said[0] and "3 tries" in said[-1]


def test_the_policy_decides_how_long(store, monkeypatch):
    """Catches `stop` that waits for ever and `wait` that gives up; `hurry` ends either with its next failure."""
    error = OSError(errno.EIO, "broken")
    store.config.on_failure = FailurePolicy.stop
    tries = _failing(store, monkeypatch, 10**9, error)
    saver = Saver(store, lambda text: None)
    saver.start(1, [TensorSlice.whole("t", torch.ones(1))], {})
    _wait(saver)
    assert saver.failure is error and len(tries) == 3
    store.config.on_failure = FailurePolicy.wait
    saver.start(2, [TensorSlice.whole("t", torch.ones(1))], {})
    while len(tries) < 20:
        assert saver.busy
    saver.close()
    assert saver.failure is error and not saver.busy


def test_a_bug_is_kept_for_whoever_asks(store, monkeypatch):
    """Catches a thread that dies of a bug while training goes on as if it were saved."""
    error = ValueError("a bug")
    _failing(store, monkeypatch, 1, error)
    saver = Saver(store, pytest.fail)
    saver.start(1, [TensorSlice.whole("t", torch.ones(1))], {})
    _wait(saver)
    assert saver.failure is error
