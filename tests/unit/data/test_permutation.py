"""Catches: rows repeated or lost within an epoch; seeds, sources, epochs or blocks in the same order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.data.permutation import epoch_key, permute_array


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, epoch_key(7, "a", 3)])
def test_every_small_length_is_a_permutation(key: int) -> None:
    for length in range(1, 301):
        result = permute_array(np.arange(length), length, key)
        assert np.array_equal(np.sort(result), np.arange(length)), length


@pytest.mark.parametrize("length", [2**20, 2**20 + 1, 1_000_003])
def test_large_lengths_are_permutations(length: int) -> None:
    result = permute_array(np.arange(length), length, epoch_key(0, "a", 0))
    assert np.array_equal(np.sort(result), np.arange(length))


@settings(deadline=None, max_examples=50)
@given(length=st.integers(10**6, 2**61), key=st.integers(0, 2**64 - 1), start=st.integers(0, 10**6 - 1000))
def test_huge_lengths_stay_in_range_and_never_collide(length: int, key: int, start: int) -> None:
    result = permute_array(np.arange(start, start + 1000), length, key)
    assert len(np.unique(result)) == 1000
    assert result.min() >= 0
    assert result.max() < length


@settings(deadline=None)
@given(length=st.integers(1, 10**9), key=st.integers(), data=st.data())
def test_indices_are_permuted_each_by_itself(length: int, key: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=5)))
    alone = [permute_array(indices[i : i + 1], length, key)[0] for i in range(len(indices))]
    assert alone == permute_array(indices, length, key).tolist()


def test_seeds_sources_epochs_and_blocks_differ_and_look_shuffled() -> None:
    indices = np.arange(10_000)
    keys = [epoch_key(seed, "a", epoch) for seed in range(3) for epoch in range(3)]
    keys += [epoch_key(0, "b", 0), epoch_key(0, "a", 0, 0), epoch_key(0, "a", 0, 1), epoch_key(0, "a", 1, 0)]
    orders = [permute_array(indices, 10_000, key) for key in keys]
    for i, order in enumerate(orders):
        # The correlation of a random order with the natural one, or another random one, is about 0.01.
        assert abs(np.corrcoef(order, indices)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        for other in orders[:i]:
            assert (order == other).sum() < 20
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05


def test_first_place_is_uniform() -> None:
    places = [permute_array(np.array([0]), 5, epoch_key(seed, "a", 0))[0] for seed in range(2000)]
    assert np.bincount(places, minlength=5).min() > 320
