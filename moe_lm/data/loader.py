"""Whole optimizer steps of batches: a pure function of (configuration, seed, data step).

Rows are numbered n = 0, 1, 2 … over the whole run. Step k takes the rows k·B … k·B + B − 1 of a global batch of B, and
process r of W the rows with n mod W = r, whatever kind the source is. The mixture says which source row n comes from,
and how many of that source's rows came before it (`mixture.py`). Here these are looked up in token shards: row i of a
source is place i mod N of epoch i div N, and each epoch permutes the source's N rows anew (`permutation.py`). Nothing
is remembered between steps, so the state is the step's number. Streams, which do remember, are in `streams.py`.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.batch import IGNORED, Batch, make_batch
from moe_lm.data.config import Packing
from moe_lm.data.mixture import Mixture
from moe_lm.data.permutation import epoch_key, permute_array
from moe_lm.data.rows import Pieces, RowSet
from moe_lm.data.shards import TokenArray
from moe_lm.errors import InputError

ENDLESS = 2**48
"""Rows of a source that no run comes to the end of; so many times the number of shares still fit into 64 bits."""

ORDER_CHUNK = 4096
"""Places of an epoch's order that are computed at a time: numpy's calls cost more than a few numbers."""


@dataclass(frozen=True)
class StepBatch:
    """One process's share of what one optimizer step trains on."""

    micro_batches: list[Batch]
    num_targets: int
    """Targets of this share."""
    domain_tokens: NDArray[np.int64]
    """Input tokens of this share that count in routing, of each domain."""
    live_sources: NDArray[np.int64]
    """Of each source, how many of its streams still had text at this step; where the sum over all processes is 0, the
    data ends before this step."""
    state: dict[str, Any]
    """Where the data stands behind this step, JSON; empty where the step's number says it all."""


class Loader(Protocol):
    """Gives the steps of a run."""

    @property
    def num_steps(self) -> int | None:
        """Steps until the data ends; null where it does not, or nobody knows yet."""

    def step(self, data_step: int) -> StepBatch:
        """This process's share of a data step; asked for one after the other."""


@dataclass(frozen=True)
class BatchPlan:
    """How a run cuts its batches, and which share of them is this process's."""

    seed: int
    global_batch_size: int
    micro_batch_size: int
    sequence_length: int
    pad_id: int
    domains: Sequence[str]
    """Names of all domains, in the order of their ids."""
    mask_documents: bool = True
    route_prompts: bool = True
    packing: Packing = Packing.sequential
    epochs: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Checks that a global batch is a whole number of micro-batches on every process.

        Raises:
            InputError: It is not.
        """
        validate_batch_sizes(self.global_batch_size, self.micro_batch_size, self.world_size)
        assert 0 <= self.rank < self.world_size

    def own_rows(self, data_step: int) -> NDArray[np.int64]:
        """Numbers of this process's rows of a step."""
        first = data_step * self.global_batch_size
        return np.arange(first + self.rank, first + self.global_batch_size, self.world_size)

    def assemble(
        self, pieces: Sequence[tuple[TokenArray, Pieces]], live_sources: NDArray[np.int64], state: dict[str, Any]
    ) -> StepBatch:
        """Makes the step's batches of pieces of rows 0 … of this process's share."""
        num_rows = self.global_batch_size // self.world_size
        ids = {name: index for index, name in enumerate(self.domains)}
        whole = make_batch(
            pieces,
            num_rows,
            self.sequence_length,
            mask_documents=self.mask_documents,
            pad_id=self.pad_id,
            domain_ids=ids,
            route_prompts=self.route_prompts,
        )
        if len(self.domains) == 1:
            domain_tokens = np.array([int(whole.routing_mask.sum())])
        else:
            real = whole.domain_ids[whole.routing_mask].numpy()
            domain_tokens = np.bincount(real, minlength=len(self.domains)).astype(np.int64)
        num_targets = int((whole.labels != IGNORED).sum())
        return StepBatch(whole.split(self.micro_batch_size), num_targets, domain_tokens, live_sources, state)


class ShardLoader:
    """Steps of prepared shards, in any order."""

    def __init__(
        self, sources: Sequence[Sequence[TokenArray]], names: Sequence[str], mixture: Mixture, plan: BatchPlan
    ) -> None:
        """Cuts the shards into rows.

        Args:
            sources: The shards of each source.
            names: The sources' names.
            mixture: Which source each row comes from.
            plan: How batches are cut.
        """
        self._plan, self._mixture, self._names = plan, mixture, names
        self._sets = [RowSet(shards, plan.sequence_length, plan.packing) for shards in sources]
        self._sizes = np.array([rows.num_rows for rows in self._sets], dtype=np.int64)
        assert self._sizes.all(), "a source without a row is refused before"
        self._last_row = (
            None if plan.epochs is None else _rows_until_used_up(mixture, _limits(self._sizes, plan.epochs))
        )
        self.num_steps = None if self._last_row is None else -(-self._last_row // plan.global_batch_size)

    def step(self, data_step: int) -> StepBatch:
        """This process's share of data step 0, 1, 2 …; the order of calls does not matter."""
        pieces = []
        for source, (rows, places) in self.rows_of(data_step).items():
            pieces += self._sets[source].pieces(rows, places)
        return self._plan.assemble(pieces, np.ones(len(self._sets), dtype=np.int64), {})

    def rows_of(self, data_step: int) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """By source, which of its rows this process has in a step, and at which places of its share."""
        assert data_step >= 0
        numbers = self._plan.own_rows(data_step)
        if self._last_row is not None:
            numbers = numbers[numbers < self._last_row]
        source_N, ordinal_N = self._mixture.locate(numbers)
        found = {}
        for source in np.unique(source_N).tolist():
            places = np.flatnonzero(source_N == source)
            size = int(self._sizes[source])
            epoch_N, place_N = np.divmod(ordinal_N[places], size)
            rows = np.empty_like(place_N)
            chunk_N, within_N = np.divmod(place_N, ORDER_CHUNK)
            for epoch, chunk in sorted(set(zip(epoch_N.tolist(), chunk_N.tolist()))):
                chosen = (epoch_N == epoch) & (chunk_N == chunk)
                rows[chosen] = self._order(source, epoch, chunk)[within_N[chosen]]
            found[source] = (rows, places)
        return found

    @functools.lru_cache(maxsize=64)  # noqa: B019 -- a run has one loader
    def _order(self, source: int, epoch: int, chunk: int) -> NDArray[np.int64]:
        """Rows at places ORDER_CHUNK · chunk … of an epoch's order."""
        size = int(self._sizes[source])
        places = np.arange(chunk * ORDER_CHUNK, min((chunk + 1) * ORDER_CHUNK, size))
        return permute_array(places, size, epoch_key(self._plan.seed, self._names[source], epoch))


def _limits(sizes: NDArray[np.int64], epochs: int) -> NDArray[np.int64]:
    """Rows that so many epochs have of each source, or as many as matter."""
    return np.array([min(size * epochs, ENDLESS) for size in sizes.tolist()], dtype=np.int64)


def _rows_until_used_up(mixture: Mixture, limits: NDArray[np.int64]) -> int:
    """Rows of the run before the first that would take more than `limits` rows of a source."""
    low, high = 0, 1
    while (mixture.counts(high) <= limits).all():
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (mixture.counts(middle) <= limits).all() else (low, middle)
    return low


def validate_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Checks that a global batch is a whole number of micro-batches on every rank.

    Raises:
        InputError: It is not; the sentence names the nearest size that is.
    """
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
    shards: Sequence[TokenArray],
    batch_size: int,
    sequence_length: int,
    *,
    mask_documents: bool = True,
    pad_id: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Gives every row of shards once, in order, each rank a contiguous share.

    Every rank gets the same number of equally large batches, as collectives need: rows of padding (no targets, no
    routed tokens) fill the last share up. Only the last batch may be smaller than `batch_size`.

    Args:
        shards: The held-out tokens.
        batch_size: Rows per batch on one rank.
        sequence_length: Tokens per row.
        mask_documents: Whether positions and attention stay within documents.
        pad_id: Id of padding.
        rank: Which share to give.
        world_size: Into how many shares the rows are cut.
        max_rows: Most rows over all ranks; of more, evenly spaced ones are chosen.
    """
    row_set = RowSet(shards, sequence_length, Packing.sequential)
    chosen = row_set.num_rows if max_rows is None else min(max_rows, row_set.num_rows)
    share = -(-chosen // world_size)
    own = np.arange(rank * share, min((rank + 1) * share, chosen)) * row_set.num_rows // max(1, chosen)
    for start in range(0, share, batch_size):
        rows = own[start : start + batch_size]
        pieces = row_set.pieces(rows, np.arange(len(rows)))
        size = min(batch_size, share - start)
        yield make_batch(pieces, size, sequence_length, mask_documents=mask_documents, pad_id=pad_id)
