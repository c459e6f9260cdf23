"""Catches: labels off by one or across documents, positions or documents that do not restart, padding that counts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.data.batch import IGNORED, Batch, make_batch
from moe_lm.data.config import Packing
from moe_lm.data.rows import RowSet
from moe_lm.data.shards import TokenArray

MakeArray = Callable[..., TokenArray]
BOS, EOS, PAD, A, B, C, D = 1, 2, 3, *(ord(letter) + 4 for letter in "abcd")
FIELDS = ("input_ids", "labels", "position_ids", "document_ids", "routing_mask", "domain_ids")
TEXTS = st.lists(st.text(alphabet="abé\n", max_size=30), min_size=1, max_size=12)


def batch_of(
    arrays: Sequence[TokenArray],
    rows: Sequence[int] | None,
    length: int,
    packing: Packing = Packing.sequential,
    **options: Any,
) -> Batch:
    """Rows, or all of them, as a batch."""
    row_set = RowSet(arrays, length, packing)
    numbers = np.arange(row_set.num_rows) if rows is None else np.array(rows)
    options = {"num_rows": len(numbers), "pad_id": PAD, **options}
    return make_batch(row_set.pieces(numbers, np.arange(len(numbers))), sequence_length=length, **options)


def test_rows_by_hand(make_array: MakeArray) -> None:
    array = make_array(["ab", "c", "d"])  # <s> a b </s> <s> c </s> <s> d </s>
    batch = batch_of([array], [0, 1], 6, num_rows=3)
    empty, none = [PAD] * 6, [0] * 6
    assert batch.input_ids.tolist() == [[BOS, A, B, EOS, BOS, C], [EOS, BOS, D, PAD, PAD, PAD], empty]
    assert batch.labels.tolist() == [
        [A, B, EOS, IGNORED, C, EOS],
        [IGNORED, D, EOS, IGNORED, IGNORED, IGNORED],
        [IGNORED] * 6,
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 0, 1, 0, 0, 0], none]
    assert batch.document_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 2, 2, 0, 0, 0], none]
    assert batch.routing_mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3, [False] * 6]
    assert batch.domain_ids.tolist() == [none] * 3


def test_rows_by_hand_without_document_masks(make_array: MakeArray) -> None:
    batch = batch_of([make_array(["ab", "c", "d"])], [1, 0], 6, mask_documents=False)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.document_ids is None
    assert [part.document_ids for part in batch.split(1)] == [None, None]
    assert batch.labels.tolist() == [[IGNORED, D, EOS] + [IGNORED] * 3, [A, B, EOS, IGNORED, C, EOS]]


def test_best_fit_rows_by_hand(make_array: MakeArray) -> None:
    """Also: a document longer than a row, whose second piece begins with position 0 in another row."""
    batch = batch_of([make_array(["abcdab", "a", "bc"])], None, 6, Packing.best_fit)
    assert batch.input_ids.tolist() == [[BOS, A, B, C, D, A], [BOS, B, C, BOS, A, B]]
    assert batch.labels.tolist() == [[A, B, C, D, A, B], [B, C, EOS, A, EOS, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    assert batch.document_ids.tolist() == [[1] * 6, [1, 1, 1, 2, 2, 3]]
    whole = batch_of([make_array(["abc", "a"])], None, 5, Packing.best_fit, mask_documents=False)
    assert whole.input_ids.tolist() == [[BOS, A, B, C, PAD], [BOS, A, PAD, PAD, PAD]]
    assert whole.labels.tolist() == [[A, B, C, EOS, IGNORED], [A, EOS, IGNORED, IGNORED, IGNORED]]


def test_domains_are_numbered_by_name_across_arrays(make_array: MakeArray) -> None:
    """Catches an array's own numbers used as those of the run, and the domain of a row's first piece for all of it."""
    one, two = make_array(["a", "b"], ["code", "web"]), make_array(["c", "d"], ["web", "math"])
    numbers = {"code": 0, "math": 1, "web": 2}
    batch = batch_of([one, two], None, 10, num_rows=3, domain_ids=numbers)
    assert batch.domain_ids.tolist() == [[0] * 3 + [2] * 2 + [0] * 5, [2] * 3 + [1] * 2 + [0] * 5, [0] * 10]
    whole = batch_of([one, two], None, 10, num_rows=3, domain_ids=numbers, mask_documents=False)
    assert torch.equal(whole.domain_ids, batch.domain_ids)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("mask_documents", [False, True])
def test_rows_of_padding_alone(num_rows: int, mask_documents: bool) -> None:
    """Catches a share of a step without any text (behind the last epoch) that fails or counts."""
    batch = make_batch([], num_rows, 4, pad_id=PAD, mask_documents=mask_documents, domain_ids={"text": 0})
    assert batch.input_ids.tolist() == [[PAD] * 4] * num_rows
    assert batch.labels.tolist() == [[IGNORED] * 4] * num_rows
    for field in FIELDS[2:]:
        numbers = getattr(batch, field)
        assert not numbers.any() if mask_documents or field != "document_ids" else numbers is None


def test_types_moving_and_splitting(make_array: MakeArray) -> None:
    array = make_array(["abc", "some more of it"])
    batch = batch_of([array], None, 4).to("cpu")
    for field in FIELDS:
        tensor = getattr(batch, field)
        assert tensor.dtype == (torch.bool if field == "routing_mask" else torch.int64)
        assert tensor.shape == (6, 4)
        assert tensor.is_contiguous()
    parts = batch.split(4)
    assert [len(part.input_ids) for part in parts] == [4, 2]
    for field in FIELDS:
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))


@settings(deadline=None, max_examples=100)
@given(texts=TEXTS, sequence_length=st.integers(1, 40))
def test_every_row_obeys_the_definition(make_array: MakeArray, texts: list[str], sequence_length: int) -> None:
    array = make_array(texts)
    batch = batch_of([array], None, sequence_length)
    tokens = array.tokens.tolist()
    seen = []
    for row in range(len(batch.input_ids)):
        first, document, position = row * sequence_length, 1, 0
        for column in range(sequence_length):
            place = first + column
            cell = (row, column)
            if place >= len(tokens) - 1:
                assert not batch.routing_mask[cell]
                assert batch.labels[cell] == IGNORED
                assert batch.input_ids[cell] == PAD
                assert batch.document_ids[cell] == 0
                assert batch.position_ids[cell] == 0
                continue
            if column and tokens[place] == BOS:
                document, position = document + 1, 0
            assert batch.input_ids[cell] == tokens[place]
            assert batch.document_ids[cell] == document
            assert batch.position_ids[cell] == position
            assert batch.routing_mask[cell]
            assert batch.labels[cell] == (IGNORED if tokens[place + 1] == BOS else tokens[place + 1])
            position += 1
            seen.append(place + 1)
    assert seen == list(range(1, len(tokens)))


@settings(deadline=None, max_examples=150)
@given(
    parts=st.lists(TEXTS, min_size=1, max_size=3),
    sequence_length=st.integers(1, 40),
    packing=st.sampled_from(Packing),
    mask_documents=st.booleans(),
    data=st.data(),
)
def test_a_batch_is_its_pieces_cell_by_cell(
    make_array: MakeArray,
    parts: list[list[str]],
    sequence_length: int,
    packing: Packing,
    mask_documents: bool,
    data: st.DataObject,
) -> None:
    """Catches pieces of several arrays that get into each other's rows, in any order of rows, and whatever a row holds
    besides its pieces: against one cell written after the other."""
    domains = [[f"d{(len(text) + index) % 3}" for text in texts] for index, texts in enumerate(parts)]
    arrays = [make_array(texts, own) for texts, own in zip(parts, domains)]
    row_set = RowSet(arrays, sequence_length, packing)
    rows = np.array(data.draw(st.lists(st.integers(0, row_set.num_rows - 1), max_size=6)), dtype=np.int64)
    num_rows = max(1, len(rows) + data.draw(st.integers(0, 2)))
    places = np.array(data.draw(st.permutations(range(num_rows)))[: len(rows)], dtype=np.int64)
    pieces = row_set.pieces(rows, places)
    numbers = {"d0": 7, "d1": 0, "d2": 3}
    batch = make_batch(pieces, num_rows, sequence_length, mask_documents=mask_documents, pad_id=PAD, domain_ids=numbers)
    expected = {field: torch.zeros(num_rows, sequence_length, dtype=torch.int64) for field in FIELDS}
    expected["input_ids"].fill_(PAD)
    expected["labels"].fill_(IGNORED)
    for array, of_array in pieces:
        starts = set(array.starts.tolist())
        document = [0] * num_rows
        for row, column, first, length in zip(*(field.tolist() for field in of_array)):
            for token in range(first, first + length):
                if token == first or token in starts:
                    document[row], position = document[row] + 1, 0
                cell = (row, column + token - first)
                values = {
                    "input_ids": int(array.tokens[token]),
                    "labels": IGNORED if token + 1 in starts else int(array.tokens[token + 1]),
                    "position_ids": position if mask_documents else cell[1],
                    "document_ids": document[row],
                    "routing_mask": 1,
                    "domain_ids": numbers[
                        array.domain_names[array.domains[array.starts.searchsorted(token, side="right") - 1]]
                    ],
                }
                for field, value in values.items():
                    expected[field][cell] = value
                position += 1
    if not mask_documents:
        assert batch.document_ids is None
        del expected["document_ids"]
    for field, values in expected.items():
        assert torch.equal(getattr(batch, field).long(), values), field


@pytest.mark.parametrize("sequence_length", [2, 7, 64, 10_000])
def test_targets_spell_the_documents(make_array: MakeArray, random_texts: list[str], sequence_length: int) -> None:
    batch = batch_of([make_array(random_texts)], None, sequence_length)
    targets = batch.labels[batch.labels != IGNORED].tolist()
    documents = bytes(0 if token == EOS else token - 4 for token in targets).split(b"\0")
    assert [document.decode() for document in documents[:-1]] == random_texts
    assert documents[-1] == b""


@pytest.mark.parametrize("packing", Packing)
def test_a_million_empty_documents_in_one_batch(packing: Packing) -> None:
    """Catches counts that overflow or go wrong where every second token begins a document."""
    count, length = 1_000_000, 1000
    starts = np.arange(0, 2 * count, 2)
    array = TokenArray(np.tile(np.array([BOS, EOS], np.uint16), count), starts, np.zeros(count, np.uint16), ["x"])
    batch = batch_of([array], None, length, packing)
    assert int((batch.labels != IGNORED).sum()) == array.num_targets == count
    if packing is Packing.sequential:
        assert batch.input_ids.shape == (2000, length)
        assert int(batch.routing_mask.sum()) == 2 * count - 1
        assert int(batch.position_ids.max()) == 1
        assert int(batch.document_ids.max()) == length // 2
    else:  # an empty document is one input, <s>, with one label, </s>
        assert batch.input_ids.shape == (1000, length)
        assert bool((batch.input_ids == BOS).all() and (batch.labels == EOS).all())
        assert torch.equal(batch.document_ids[-1], torch.arange(1, length + 1))
        assert int(batch.position_ids.max()) == 0
