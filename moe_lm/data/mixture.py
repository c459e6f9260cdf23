"""Which source each row of a run comes from: exact shares, without chance, as a closed formula of the row's number.

Rows are taken in frames of 1,000. Row n of frame f is the point  n·a/1000 + f/10⁴  (mod 1) of the unit circle, which
the sources share out in arcs as long as their weights; the row comes from the source whose arc holds its point. With a
prime to 1000, the points of any 1,000 rows in a row form an even grid, so each source gets its share of them rounded
down or up; and because the grid moves by a tenth of its spacing with each frame, what rounding leaves over in one frame
is made up within ten. With weights that are whole ten-thousandths (they are rounded to that) every window of 1,000 rows
is within one row of its exact share, and every ten frames together have exactly it.

(Error diffusion, the obvious way, keeps every *prefix* within one row, so that a window, the difference of two
prefixes, can be off by nearly two; and it needs its history, where this is a function of n.)

Letters: K sources, N rows.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.config import DataConfig, SourceConfig
from moe_lm.data.shards import TokenArray
from moe_lm.errors import InputError

FRAME = 1000
UNITS = 10_000
"""Weights are whole multiples of 1/UNITS."""
STRIDE = 633
"""Prime to FRAME; of all such numbers, STRIDE / FRAME has the smallest partial quotients (at most 3), which is what
keeps short windows even too."""


def shares(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Weights [..., K] as whole ten-thousandths that add up to one (largest remainders)."""
    exact = weights / weights.sum(axis=-1, keepdims=True) * UNITS
    units = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(units - exact, axis=-1, kind="stable"), axis=-1, kind="stable")
    return units + (rank < UNITS - units.sum(axis=-1, keepdims=True))


class Mixture:
    """The source of every row, and how many rows of each source come before it."""

    def __init__(
        self,
        weights: NDArray[np.float64],
        final_weights: NDArray[np.float64] | None = None,
        num_rows: int | None = None,
    ) -> None:
        """Takes the weights.

        Args:
            weights: One for each source, not all 0; they need not add up to one.
            final_weights: Weights at row `num_rows`, reached linearly, frame by frame; null keeps `weights`.
            num_rows: Rows of the whole run.
        """
        self._weights = np.asarray(weights, dtype=np.float64)
        self._final = None if final_weights is None else np.asarray(final_weights, dtype=np.float64)
        self._num_rows = num_rows
        self._constant = shares(self._weights)
        self._counted = np.zeros((1, len(self._weights)), dtype=np.int64)

    @property
    def num_sources(self) -> int:
        """K."""
        return len(self._weights)

    def locate(self, rows_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each row, and the number of that source's rows before it: the row's number within its source."""
        if self.num_sources == 1:
            return np.zeros_like(rows_N), rows_N
        frame_N, place_N = np.divmod(rows_N, FRAME)
        source_N, ordinal_N = np.empty_like(rows_N), np.empty_like(rows_N)
        for frame in np.unique(frame_N).tolist():
            chosen = frame_N == frame
            source, before = self._frame(frame)
            place = place_N[chosen]
            source_N[chosen] = source[place]
            ordinal_N[chosen] = before[place] + self._rows_before(frame)[source[place]]
        return source_N, ordinal_N

    def counts(self, row: int) -> NDArray[np.int64]:
        """Rows of each source among the first `row` rows."""
        if self.num_sources == 1:
            return np.array([row])
        frame, place = divmod(row, FRAME)
        return self._rows_before(frame) + np.bincount(self._frame(frame)[0][:place], minlength=self.num_sources)

    def _units(self, frame_F: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shares [F, K] that hold in frames."""
        if self._final is None:
            return np.broadcast_to(self._constant, (len(frame_F), self.num_sources))
        assert self._num_rows is not None
        # The middle of a frame's rows, so that the shares of the whole run are those of a line from begin to end.
        middle = (frame_F * FRAME + np.minimum((frame_F + 1) * FRAME, self._num_rows)) / 2
        progress = np.clip(middle / self._num_rows, 0.0, 1.0)
        begin, end = self._weights / self._weights.sum(), self._final / self._final.sum()
        return shares(begin + progress[:, None] * (end - begin))

    @functools.lru_cache(maxsize=8)  # noqa: B019 -- a run has one mixture
    def _frame(self, frame: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each row of a frame, and the rows of the same source before it within the frame."""
        ends_K = np.cumsum(self._units(np.array([frame]))[0])
        # In units of 1/UNITS everything is a whole number: there is no rounding to differ between machines.
        point = (np.arange(FRAME) * STRIDE % FRAME * (UNITS // FRAME) + frame) % UNITS
        source = np.searchsorted(ends_K, point, side="right")
        one_hot = source[:, None] == np.arange(self.num_sources)
        before = np.cumsum(one_hot, axis=0) - one_hot
        return source, before[np.arange(FRAME), source]

    def _rows_before(self, frame: int) -> NDArray[np.int64]:
        """Rows of each source in all earlier frames."""
        period = UNITS // FRAME
        if self._final is None and frame >= period:
            # Shares of ten frames are exact, and the grid has then moved by its spacing: the counts repeat.
            return frame // period * self._constant + self._rows_before(frame % period)
        if frame >= len(self._counted):
            first = len(self._counted) - 1
            new = self._count_frames(np.arange(first, frame))
            self._counted = np.concatenate([self._counted, self._counted[-1] + np.cumsum(new, axis=0)])
        return self._counted[frame]

    def _count_frames(self, frame_F: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows [F, K] of each source in frames."""
        ends_FK = np.cumsum(self._units(frame_F), axis=1)
        step = UNITS // FRAME
        # The grid of a frame is {shift, shift + step, …}: as many points lie below an end as fit.
        below_FK = -(-(ends_FK - (frame_F % step)[:, None]) // step)
        return np.diff(below_FK, axis=1, prepend=0)


def shares_move(sources: Iterable[SourceConfig]) -> bool:
    """Whether the shares of sources are others at the end of a run than at its beginning.

    The same shares can be written in other numbers (0.1, 0.1, 0.9 and 1, 1, 9), whose quotients differ by rounding. So
    less than a trillionth of a share is no move; rows follow shares in whole ten-thousandths.
    """
    weights, final = _weights(sources)
    if not weights:
        return False
    begin, end = np.array(weights), np.array(final)
    return not np.allclose(begin / begin.sum(), end / end.sum(), rtol=1e-12, atol=0)


def _weights(sources: Iterable[SourceConfig]) -> tuple[list[float], list[float]]:
    """Weights at the beginning and at the end, of the sources that have one."""
    weighed = [(source.weight, source.final_weight) for source in sources if source.weight is not None]
    return [weight for weight, _ in weighed], [weight if final is None else final for weight, final in weighed]


def make_mixture(config: DataConfig, sources: Mapping[str, Sequence[TokenArray]], total_rows: int) -> Mixture:
    """The mixture of sources by their names' order, from the weights of the configuration.

    Raises:
        InputError: A weight, or without weights a size, is too small to be seen, or none is above 0.
    """
    names = sorted(sources)
    given = [config.sources.get(name) for name in names]
    if not any(source is not None and source.weight is not None for source in given):
        if len(names) == 1:
            return Mixture(np.ones(1))  # a stream has no size
        sizes = np.array([sum(array.num_tokens for array in sources[name]) for name in names], dtype=np.float64)
        for name, units in zip(names, shares(sizes).tolist()):
            if units == 0:
                raise InputError(
                    f"data.sources.{name}.weight=null: by its size it gets less than one row in 10000, that is, none; "
                    "give every source a weight."
                )
        return Mixture(sizes)
    weighed = []
    for name, source in zip(names, given):
        if source is None or source.weight is None:
            raise InputError(f"data.sources.{name}.weight=null: other sources have weights; give this one too.")
        weighed.append(source)
    weights, final = _weights(weighed)
    for what, values in (("weight", weights), ("final_weight", final)):
        if not 0 < sum(values) < math.inf:
            raise InputError(
                f"data.sources.{names[0]}.{what}={values[0]}: the weights of all sources must add up to a number above "
                "0, and not to infinity."
            )
        # Asked of the shares themselves: which of several small weights is rounded down depends on the others.
        for name, value, units in zip(names, values, shares(np.array(values)).tolist()):
            if value > 0 and units == 0:
                raise InputError(f"data.sources.{name}.{what}={value}: is less than one row in 10000; give 0, or more.")
    begin, end = np.array(weights), np.array(final)
    return Mixture(begin, end, total_rows) if shares_move(weighed) else Mixture(begin)
