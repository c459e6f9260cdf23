"""Whole optimizer steps of batches: a pure function of (configuration, seed, data step).

Nothing is remembered between steps, so resuming is calling `step` with the next number, and every rank computes the
global batch's rows and counts by itself, without communication. Rows are numbered k = 0, 1, 2 … over the whole run;
row k is place k mod N of epoch k div N, and each epoch permutes the N rows of the shard anew (`permutation.py`).
A global batch may straddle two epochs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.batch import EMPTY_ROW, Batch, count_tokens, make_batch, num_rows
from moe_lm.data.permutation import epoch_key, permute_array
from moe_lm.data.shards import TokenShard
from moe_lm.errors import InputError


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step trains on."""

    micro_batches: list[Batch]
    """This rank's share, in order."""
    num_targets: int
    """Targets in the global batch, over all ranks: what the summed loss is divided by."""
    num_routed_tokens: int
    """Real input tokens in the global batch, over all ranks."""
    rows: list[int]
    """Row ids of the global batch, in order; rank r has the r-th of `world_size` equal slices."""


class StepLoader:
    """Gives the batches of any data step of a run."""

    def __init__(
        self,
        shard: TokenShard,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        sequence_length: int,
        mask_documents: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Checks that the sizes fit.

        Args:
            shard: The training tokens.
            seed: The run's seed; with the epoch, it decides the order of rows.
            global_batch_size: Rows per optimizer step, over all ranks.
            micro_batch_size: Rows per forward and backward on one rank.
            sequence_length: Tokens per row.
            mask_documents: Whether positions and attention stay within documents.
            rank: Which share to give.
            world_size: Into how many shares a global batch is cut.

        Raises:
            InputError: The global batch is not a whole number of micro-batches on every rank.
        """
        validate_batch_sizes(global_batch_size, micro_batch_size, world_size)
        assert 0 <= rank < world_size
        self.shard, self.seed, self.sequence_length, self.mask_documents = shard, seed, sequence_length, mask_documents
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.num_rows = num_rows(shard, sequence_length)
        assert self.num_rows > 0, "prepare() refuses text that is too small"

    def step(self, data_step: int) -> StepBatch:
        """The batches of data step 0, 1, 2 …; the order of calls does not matter."""
        rows = self.rows_of(data_step)
        num_targets, num_routed_tokens = count_tokens(self.shard, rows, self.sequence_length)
        share = self.global_batch_size // self.world_size
        own_rows = rows[self.rank * share : (self.rank + 1) * share]
        micro_batches = [
            make_batch(self.shard, own_rows[i : i + self.micro_batch_size], self.sequence_length, self.mask_documents)
            for i in range(0, share, self.micro_batch_size)
        ]
        return StepBatch(micro_batches, num_targets, num_routed_tokens, rows.tolist())

    def rows_of(self, data_step: int) -> NDArray[np.int64]:
        """Row ids of a step's global batch, in order."""
        assert data_step >= 0
        first = data_step * self.global_batch_size
        epochs, places = np.divmod(first + np.arange(self.global_batch_size), self.num_rows)
        rows = np.empty(self.global_batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = permute_array(places[chosen], self.num_rows, epoch_key(self.seed, int(epoch)))
        return rows


def validate_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Checks that a global batch is a whole number of micro-batches on every rank.

    Raises:
        InputError: It is not; the sentence names the nearest size that is.
    """
    for name, value in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise InputError(f"trainer.{name}={value}: must be at least 1 row.")
    unit = micro_batch_size * world_size
    if global_batch_size % unit:
        nearest = max(1, round(global_batch_size / unit)) * unit
        share = global_batch_size // world_size
        smaller = max(size for size in range(1, max(share, 1) + 1) if share % size == 0 and size <= micro_batch_size)
        fits = global_batch_size % world_size == 0
        other = f", or set trainer.micro_batch_size={smaller}" if fits else ""
        raise InputError(
            f"trainer.global_batch_size={global_batch_size}: must be a multiple of trainer.micro_batch_size="
            f"{micro_batch_size} times {world_size} process{'' if world_size == 1 else 'es'}, such as {nearest}{other}."
        )


def validation_batches(
    shard: TokenShard,
    batch_size: int,
    sequence_length: int,
    *,
    mask_documents: bool = True,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Gives every row of a shard once, in order, each rank a contiguous share.

    Every rank gets the same number of equally large batches, as collectives need: rows of padding (no targets, no
    routed tokens) fill the last share up. Only the last batch may be smaller than `batch_size`.

    Args:
        shard: The held-out tokens.
        batch_size: Rows per batch on one rank.
        sequence_length: Tokens per row.
        mask_documents: Whether positions and attention stay within documents.
        rank: Which share to give.
        world_size: Into how many shares the rows are cut.
        max_rows: Most rows over all ranks; of more, evenly spaced ones are chosen.
    """
    total = num_rows(shard, sequence_length)
    chosen = total if max_rows is None else min(max_rows, total)
    share = -(-chosen // world_size)
    rows = np.full(share * world_size, EMPTY_ROW, dtype=np.int64)
    rows[:chosen] = np.arange(chosen) * total // max(1, chosen)
    own_rows = rows[rank * share : (rank + 1) * share]
    for start in range(0, share, batch_size):
        yield make_batch(shard, own_rows[start : start + batch_size], sequence_length, mask_documents)
