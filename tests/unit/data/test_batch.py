"""Catches: labels off by one or across documents, positions or documents that do not restart, padding that counts."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lm.data.batch import EMPTY_ROW, IGNORED, count_tokens, make_batch, num_rows
from moe_lm.data.shards import TokenShard

MakeShard = Callable[[Sequence[str]], TokenShard]
BOS, EOS, PAD, A, B, C, D = 1, 2, 3, *(ord(letter) + 4 for letter in "abcd")


def test_rows_by_hand(make_shard: MakeShard) -> None:
    shard = make_shard(["ab", "c", "d"])  # <s> a b </s> <s> c </s> <s> d </s>
    assert num_rows(shard, 6) == 2
    batch = make_batch(shard, np.array([0, 1, EMPTY_ROW]), 6)
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


def test_rows_by_hand_without_document_masks(make_shard: MakeShard) -> None:
    batch = make_batch(make_shard(["ab", "c", "d"]), np.array([1, 0]), 6, mask_documents=False)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch.labels.tolist() == [[IGNORED, D, EOS] + [IGNORED] * 3, [A, B, EOS, IGNORED, C, EOS]]


def test_types_and_moving(make_shard: MakeShard) -> None:
    batch = make_batch(make_shard(["abc"]), np.array([0]), 4).to("cpu")
    for name in ("input_ids", "labels", "position_ids", "document_ids", "domain_ids"):
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64
        assert tensor.shape == (1, 4)
        assert tensor.is_contiguous()
    assert batch.routing_mask.dtype == torch.bool


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(alphabet="abé\n", max_size=30), min_size=1, max_size=12),
    sequence_length=st.integers(1, 40),
)
def test_every_row_obeys_the_definition(make_shard: MakeShard, texts: list[str], sequence_length: int) -> None:
    shard = make_shard(texts)
    rows = np.arange(num_rows(shard, sequence_length))
    batch = make_batch(shard, rows, sequence_length)
    tokens = shard.tokens.tolist()
    seen = []
    for row in rows.tolist():
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
    assert count_tokens(shard, rows, sequence_length) == (shard.num_targets, len(tokens) - 1)
    for row in rows.tolist():
        one = make_batch(shard, np.array([row]), sequence_length)
        expected = (int((one.labels != IGNORED).sum()), int(one.routing_mask.sum()))
        assert count_tokens(shard, np.array([row, EMPTY_ROW]), sequence_length) == expected


@pytest.mark.parametrize("sequence_length", [2, 7, 64, 10_000])
def test_targets_spell_the_documents(make_shard: MakeShard, random_texts: list[str], sequence_length: int) -> None:
    shard = make_shard(random_texts)
    batch = make_batch(shard, np.arange(num_rows(shard, sequence_length)), sequence_length)
    targets = batch.labels[batch.labels != IGNORED].tolist()
    documents = bytes(0 if token == EOS else token - 4 for token in targets).split(b"\0")
    assert [document.decode() for document in documents[:-1]] == random_texts
    assert documents[-1] == b""
