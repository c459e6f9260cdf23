"""Rows: how an array of documents is cut into pieces of a sequence length, and which pieces make a row.

A piece is `length` inputs from token `first` on; the label of each input is the token behind it.

Sequential: row i is tokens [i·S, i·S + S + 1), one piece; neighbouring rows share one token, and every token but the
first is a label exactly once. A label that would be the begin mark of the next document is no target. The last row is
shorter: dropping it would leave its targets out of every epoch.

Best fit: a document of n tokens has n − 1 targets; documents with more than S of them are cut into pieces of S and a
rest. Pieces are placed longest first, each into the fullest row that still has room (best-fit decreasing, Johnson
1973), so a document that fits a row is never split, and no row holds a piece that begins elsewhere.

Letters: B rows, P pieces, S sequence length.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.config import Packing
from moe_lm.data.shards import TokenArray


class Pieces(NamedTuple):
    """Pieces of rows, in order of (row, column)."""

    row_P: NDArray[np.int64]
    """Which of the rows asked for, from 0."""
    column_P: NDArray[np.int64]
    """First column in that row."""
    first_P: NDArray[np.int64]
    """First token in the array."""
    length_P: NDArray[np.int64]
    """Inputs; one token more is read, the last label."""


def ranges(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers [first, first + count) of each pair, end to end."""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first - (ends - count), count) + np.arange(total)


class Rows(Protocol):
    """The rows of one array."""

    num_rows: int

    def pieces(self, rows_B: NDArray[np.int64]) -> Pieces:
        """The pieces of rows."""


def cut(array: TokenArray, sequence_length: int, packing: Packing) -> Rows:
    """Cuts an array into rows; conversations always by best fit, since an answer means nothing without its question."""
    if packing is Packing.sequential and array.spans is None:
        return SequentialRows(array.num_tokens, sequence_length)
    return BestFitRows(array, sequence_length)


class SequentialRows:
    """Rows of S tokens, wherever documents begin and end."""

    def __init__(self, num_tokens: int, sequence_length: int) -> None:
        self._inputs, self._length = max(0, num_tokens - 1), sequence_length
        self.num_rows = -(-self._inputs // sequence_length)

    def pieces(self, rows_B: NDArray[np.int64]) -> Pieces:
        """One piece for each row."""
        first_B = rows_B * self._length
        length_B = np.minimum(self._length, self._inputs - first_B)
        return Pieces(np.arange(len(rows_B)), np.zeros_like(rows_B), first_B, length_B)


class BestFitRows:
    """Rows of whole documents, as far as they fit; their places are held in memory, which suits millions of them."""

    def __init__(self, array: TokenArray, sequence_length: int) -> None:
        ends = np.append(array.starts[1:], array.num_tokens)
        targets = ends - array.starts - 1
        whole = targets // sequence_length
        full_first = np.repeat(array.starts, whole) + sequence_length * ranges(np.zeros_like(whole), whole)
        rest = targets - whole * sequence_length
        has_rest = rest > 0
        rest_first, rest_length = (array.starts + whole * sequence_length)[has_rest], rest[has_rest]
        row_of_rest, column_of_rest = _best_fit(rest_length, sequence_length)
        row = np.concatenate([np.arange(len(full_first)), len(full_first) + row_of_rest])
        order = np.lexsort((np.concatenate([np.zeros(len(full_first), np.int64), column_of_rest]), row))
        self._first = np.concatenate([full_first, rest_first])[order]
        self._column = np.concatenate([np.zeros(len(full_first), np.int64), column_of_rest])[order]
        self._length = np.concatenate([np.full(len(full_first), sequence_length), rest_length])[order]
        self.num_rows = int(row.max()) + 1 if len(row) else 0
        self._begin = np.searchsorted(row[order], np.arange(self.num_rows + 1))

    def pieces(self, rows_B: NDArray[np.int64]) -> Pieces:
        """All pieces of the rows."""
        count_B = self._begin[rows_B + 1] - self._begin[rows_B]
        index_P = ranges(self._begin[rows_B], count_B)
        row_P = np.repeat(np.arange(len(rows_B)), count_B)
        return Pieces(row_P, self._column[index_P], self._first[index_P], self._length[index_P])


def _best_fit(lengths: NDArray[np.int64], room: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each piece."""
    row, column = np.empty_like(lengths), np.empty_like(lengths)
    open_rows: dict[int, list[int]] = {}  # room left → rows
    rooms: list[int] = []  # the keys, ascending
    num_rows = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            chosen, left, num_rows = num_rows, room, num_rows + 1
        else:
            left = rooms[place]
            chosen = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], rooms[place]
        row[index], column[index] = chosen, room - left
        left -= length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                bisect.insort(rooms, left)
            open_rows[left].append(chosen)
    return row, column


class RowSet:
    """The rows of several arrays, numbered through: those of the first, then those of the second …"""

    def __init__(self, arrays: Sequence[TokenArray], sequence_length: int, packing: Packing) -> None:
        self.arrays = list(arrays)
        self._rows = [cut(array, sequence_length, packing) for array in arrays]
        self._ends = np.cumsum([rows.num_rows for rows in self._rows], dtype=np.int64)
        self.num_rows = int(self._ends[-1]) if self._rows else 0

    def pieces(self, rows_B: NDArray[np.int64], places_B: NDArray[np.int64]) -> list[tuple[TokenArray, Pieces]]:
        """The pieces of rows, by array.

        Args:
            rows_B: Numbers of rows.
            places_B: Where in a batch each of them goes; the `row_P` of the result.
        """
        shard_B = np.searchsorted(self._ends, rows_B, side="right")
        result = []
        for index in np.unique(shard_B).tolist():
            chosen = shard_B == index
            before = int(self._ends[index - 1]) if index else 0
            pieces = self._rows[index].pieces(rows_B[chosen] - before)
            result.append((self.arrays[index], pieces._replace(row_P=places_B[chosen][pieces.row_P])))
        return result
