"""Catches: targets lost or repeated by cutting documents into rows, split documents, rows that overlap or overflow."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.data.config import Packing
from moe_lm.data.rows import BestFitRows, Rows, RowSet, SequentialRows, cut
from moe_lm.data.shards import TokenArray

BOS, EOS = 1, 2

# Documents by their tokens between the marks: empty ones, ones of a few tokens, and ones much longer than any row.
LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 50), st.integers(0, 400)), max_size=40)
SEQUENCE = st.integers(1, 40)


def array_of(lengths: list[int]) -> TokenArray:
    """Documents of these lengths (marks not counted)."""
    tokens = [token for length in lengths for token in (BOS, *range(3, 3 + length), EOS)]
    marked = np.array(lengths, dtype=np.int64) + 2
    starts = np.cumsum(marked) - marked
    return TokenArray(np.array(tokens, dtype=np.uint16), starts, np.zeros(len(lengths), np.uint16), ["text"])


def all_pieces(rows: Rows) -> list[tuple[int, int, int, int]]:
    """Row, column, first and length of every piece."""
    return list(zip(*(field.tolist() for field in rows.pieces(np.arange(rows.num_rows)))))


def targets_of(array: TokenArray, rows: Rows) -> list[int]:
    """Places of all targets in the order of rows, after checks that hold of any rows."""
    starts = set(array.starts.tolist())
    previous_row, free = -1, 0
    targets = []
    for row, column, first, length in all_pieces(rows):
        assert length > 0
        assert row in (previous_row, previous_row + 1), "a row without a piece"
        # Pieces are in order, end to end from the first column on: none overlap, and padding is only at the end.
        assert column == (free if row == previous_row else 0)
        previous_row, free = row, column + length
        assert first >= 0
        assert first + length < array.num_tokens
        targets += [place for place in range(first + 1, first + length + 1) if place not in starts]
    assert previous_row == rows.num_rows - 1
    return targets


@settings(deadline=None, max_examples=200)
@given(lengths=LENGTHS, sequence_length=SEQUENCE, packing=st.sampled_from(Packing))
def test_each_target_is_in_one_row_once(lengths: list[int], sequence_length: int, packing: Packing) -> None:
    array = array_of(lengths)
    rows = cut(array, sequence_length, packing)
    expected = sorted(set(range(array.num_tokens)) - set(array.starts.tolist()))
    targets = targets_of(array, rows)
    assert len(expected) == array.num_targets
    assert (targets if packing is Packing.sequential else sorted(targets)) == expected


@settings(deadline=None, max_examples=200)
@given(lengths=LENGTHS, sequence_length=SEQUENCE, packing=st.sampled_from(Packing))
def test_rows_are_never_overfull(lengths: list[int], sequence_length: int, packing: Packing) -> None:
    rows = cut(array_of(lengths), sequence_length, packing)
    used = np.zeros(rows.num_rows, dtype=int)
    for row, _, _, length in all_pieces(rows):
        used[row] += length
    assert (used <= sequence_length).all()
    if packing is Packing.sequential:
        assert (used[:-1] == sequence_length).all()


@settings(deadline=None, max_examples=200)
@given(lengths=LENGTHS, sequence_length=SEQUENCE)
def test_best_fit_splits_only_documents_longer_than_a_row(lengths: list[int], sequence_length: int) -> None:
    """Also catches a piece that spans documents, a long document cut into more pieces than it must be, and a piece
    that begins elsewhere than where the one before it ended."""
    array = array_of(lengths)
    expected = []
    for start, length in zip(array.starts.tolist(), lengths):
        begin, end = start, start + length + 1  # inputs: all tokens but the end mark
        while begin < end:
            expected.append((begin, min(sequence_length, end - begin)))
            begin += sequence_length
    assert (
        sorted((first, length) for _, _, first, length in all_pieces(BestFitRows(array, sequence_length))) == expected
    )


def first_fit(pieces: list[int], room: int) -> int:
    """Rows that the simplest packing takes: each piece, in order, into the first row with room for it."""
    left: list[int] = []
    for piece in pieces:
        place = next((index for index, free in enumerate(left) if free >= piece), None)
        if place is None:
            left.append(room - piece)
        else:
            left[place] -= piece
    return len(left)


def best_fit_decreasing(pieces: list[int], room: int) -> int:
    """Rows that the documented packing takes, without a clever list of rooms."""
    left: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [index for index, free in enumerate(left) if free >= piece]
        if fitting:
            left[min(fitting, key=lambda index: left[index])] -= piece
        else:
            left.append(room - piece)
    return len(left)


@settings(deadline=None, max_examples=200)
@given(lengths=LENGTHS, sequence_length=SEQUENCE)
def test_best_fit_takes_as_few_rows_as_it_says(lengths: list[int], sequence_length: int) -> None:
    """Catches rooms that are forgotten or looked up wrongly, which would lose no target but waste rows: against the
    plain algorithm, and the bound of any packing of which no two rows could be joined."""
    rows = BestFitRows(array_of(lengths), sequence_length)
    pieces = [length for _, _, _, length in all_pieces(rows)]
    assert rows.num_rows == best_fit_decreasing(pieces, sequence_length)
    best = -(-sum(pieces) // sequence_length)  # at least
    big = sum(2 * length > sequence_length for length in pieces)
    assert rows.num_rows >= max(best, big)
    assert rows.num_rows <= 2 * best


def test_best_fit_wastes_little_on_documents_of_natural_lengths() -> None:
    """Catches a packing that obeys every rule and is still poor: fewer rows than first fit, and hardly any padding."""
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 3000).astype(int).tolist()
    rows = BestFitRows(array_of(lengths), 512)
    pieces = [length for _, _, _, length in all_pieces(rows)]
    order = np.random.default_rng(1).permutation(len(pieces))
    assert rows.num_rows <= first_fit([pieces[index] for index in order], 512)
    assert sum(pieces) / (rows.num_rows * 512) > 0.99


@pytest.mark.parametrize("packing", Packing)
def test_rows_do_not_depend_on_what_they_are_asked_with(packing: Packing) -> None:
    """Catches pieces of one row given to another, in any order, with repeats, and no row at all."""
    rows = cut(array_of([5, 90, 0, 13, 2, 2, 41, 7]), 16, packing)
    by_row: dict[int, list[tuple[int, int, int]]] = {}
    for row, *piece in all_pieces(rows):
        by_row.setdefault(row, []).append(tuple(piece))
    asked = np.random.default_rng(0).integers(0, rows.num_rows, 30)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for place, *piece in zip(*(field.tolist() for field in rows.pieces(asked))):
        found.setdefault(place, []).append(tuple(piece))
    assert [found[place] for place in range(30)] == [by_row[row] for row in asked.tolist()]
    assert all(len(field) == 0 for field in rows.pieces(np.empty(0, dtype=np.int64)))


def test_an_array_of_one_piece_and_of_none() -> None:
    """Catches the edges: no document, and one that fills a row exactly or by one token more."""
    for packing in Packing:
        assert cut(array_of([]), 8, packing).num_rows == 0
        assert cut(array_of([0]), 8, packing).num_rows == 1
        assert all_pieces(cut(array_of([7]), 8, packing)) == [(0, 0, 0, 8)]
        assert all_pieces(cut(array_of([8]), 8, packing)) == [(0, 0, 0, 8), (1, 0, 8, 1)]
    assert SequentialRows(0, 8).num_rows == SequentialRows(1, 8).num_rows == 0


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(LENGTHS, max_size=5), sequence_length=SEQUENCE, packing=st.sampled_from(Packing), data=st.data())
def test_rows_of_several_arrays_are_numbered_through(
    parts: list[list[int]], sequence_length: int, packing: Packing, data: st.DataObject
) -> None:
    """Catches rows given from another array, empty arrays that shift the numbers, and places that get mixed up."""
    arrays = [array_of(lengths) for lengths in parts]
    row_set = RowSet(arrays, sequence_length, packing)
    of_each = [cut(array, sequence_length, packing) for array in arrays]
    numbered = [(index, row) for index, rows in enumerate(of_each) for row in range(rows.num_rows)]
    assert row_set.num_rows == len(numbered)
    asked = data.draw(st.lists(st.integers(0, len(numbered) - 1), max_size=20)) if numbered else []
    places = data.draw(st.permutations(range(100, 100 + len(asked))))
    found = {}
    for array, pieces in row_set.pieces(np.array(asked, dtype=np.int64), np.array(places, dtype=np.int64)):
        index = next(index for index, own in enumerate(arrays) if own is array)
        for place, *piece in zip(*(field.tolist() for field in pieces)):
            found.setdefault(place, (index, []))[1].append(piece)
            assert found[place][0] == index
    expected = {}
    for place, number in zip(places, asked):
        index, row = numbered[number]
        of_row = of_each[index].pieces(np.array([row]))
        expected[place] = (index, [list(piece) for piece in list(zip(*(field.tolist() for field in of_row[1:])))])
    assert found == expected


def test_making_a_shard_of_many_documents_costs_memory_by_pieces(make_array: Callable[..., TokenArray]) -> None:
    """Catches an index of rows by targets instead of by pieces: a document of many rows, and many small ones."""
    long = make_array(["x" * 100_000])
    assert len(all_pieces(BestFitRows(long, 1000))) == 101
    small = make_array([""] * 10_000)
    rows = BestFitRows(small, 1000)
    assert rows.num_rows == 10
    assert len(all_pieces(rows)) == 10_000
