"""Checkpoints that several processes write: each its part, one of them the rest."""

import errno

import pytest
import torch

import moe_lm.checkpoint.store as module
from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.checkpoint.tensor_file import CheckpointError

WHOLE = torch.arange(24.0).view(4, 6)


def _slices(writer: int) -> list[TensorSlice]:
    """Rows 0 and 3 belong to the first of two writers, as experts would; one more tensor to the second."""
    rows = (0, 3) if writer == 0 else (1, 2)
    slices = [TensorSlice("experts", WHOLE[row : row + 1], [4, 6], [row, 0]) for row in rows]
    return slices if writer == 0 else [*slices, TensorSlice.whole("norm", torch.ones(3))]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(keep_last=1))


def _assert_good(store: CheckpointStore, step: int) -> None:
    checkpoint = Checkpoint(store.path(step))
    assert torch.equal(checkpoint.tensor("experts"), WHOLE) and torch.equal(checkpoint.tensor("norm"), torch.ones(3))
    assert checkpoint.state == {"step": step} and store.paths() == [store.path(step)]
    names = {path.name for path in store.path(step).iterdir()}
    assert names == {*checkpoint.files, "manifest.json", "COMPLETE"}, "a part's own description is left"


def test_parts_make_one_checkpoint(store):
    """Catches slices of one writer that replace another's, and retention that does not follow."""
    for step in (1, 2):
        for writer in (1, 0):
            store.write_part(step, writer, _slices(writer))
        assert store.paths() == ([] if step == 1 else [store.path(1)])
        store.join(step, 2, {"step": step})
        _assert_good(store, step)


def test_a_part_that_is_missing_is_no_checkpoint(store):
    """Catches a checkpoint that is published without the part of a process."""
    store.write_part(1, 0, _slices(0))
    with pytest.raises(FileNotFoundError):
        store.join(1, 2, {"step": 1})
    assert store.paths() == []


@pytest.mark.parametrize("call", range(1, 7))
def test_a_join_that_failed_is_done_again(store, monkeypatch, call):
    """Catches a retry that meets its own leftovers, or a checkpoint that it has renamed already: each durable write and
    each sync of a directory fails once."""
    for writer in (0, 1):
        store.write_part(1, writer, _slices(writer))
    count = 0

    def failing(original):
        def once(*arguments):
            nonlocal count
            count += 1
            if count == call:
                raise OSError(errno.EIO, "injected")
            return original(*arguments)

        return once

    for name in ("write_durably", "sync_directory"):
        monkeypatch.setattr(module, name, failing(getattr(module, name)))
    with pytest.raises(OSError, match="injected"):
        store.join(1, 2, {"step": 1})
    store.join(1, 2, {"step": 1})
    checkpoint = Checkpoint(store.path(1))
    assert torch.equal(checkpoint.tensor("experts"), WHOLE) and count > 6


def test_a_part_that_failed_leaves_its_room_and_is_done_again(store, monkeypatch):
    """Catches a full disk that stays full of a part which nobody will join, and damage between memory and disk."""
    monkeypatch.setattr(module, "sha256", lambda path: "0" * 64)
    with pytest.raises(CheckpointError, match=r"tensors-00000-00000.safetensors does not have the content"):
        store.write_part(1, 0, _slices(0))
    assert not list(store.directory.glob(".tmp-*/*"))
    monkeypatch.undo()
    for writer in (0, 1):
        store.write_part(1, writer, _slices(writer))
    store.join(1, 2, {"step": 1})
    _assert_good(store, 1)
