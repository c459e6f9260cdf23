"""A keyed permutation of 0 … length-1 in constant memory.

A Feistel network permutes the next power of two; results outside the range are walked on until they fall inside
(cycle walking), which keeps it a permutation of the range and takes fewer than two passes on average. So a shuffled
epoch of any number of rows needs no list of indices, and the data state is one integer.
Six rounds of a 64-bit finaliser (splitmix64, Steele et al. 2014) are far more than the four after which a Feistel
network with random round functions is indistinguishable from a random permutation (Luby & Rackoff 1988).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6


def epoch_key(seed: int, source: str, epoch: int, block: int | None = None) -> int:
    """A 64-bit key for an epoch of a source, or a block of one, in a run; every epoch is shuffled anew."""
    digest = hashlib.sha256(f"moe-lm rows {seed} {source} {epoch} {block}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def permute_array(indices: NDArray[np.int64], length: int, key: int) -> NDArray[np.int64]:
    """Where a permutation of 0 … length-1 takes each index.

    Args:
        indices: Any integers in 0 … length-1, in any order.
        length: Size of the permuted range, at least 1 and below 2^62.
        key: Which permutation: any integer, of which 64 bits count.

    Returns:
        int64, one result per index.
    """
    assert length >= 1
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() < length)
    bits = max(2, (length - 1).bit_length())
    round_keys = _mix(np.uint64(key % 2**64) + np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
    result = _feistel(indices.astype(np.uint64), bits, round_keys)
    outside = np.flatnonzero(result >= length)
    while outside.size:
        result[outside] = _feistel(result[outside], bits, round_keys)
        outside = outside[result[outside] >= length]
    return result.astype(np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser; arithmetic is modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _feistel(values: NDArray[np.uint64], bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass over `bits` bits: halves swap, one of them masked by a function of the other.

    Of an odd number of bits the right half has one more, which changes sides with it; after an even number of rounds
    both are as wide as they were.
    """
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64(2**right_bits - 1)
    for round_key in round_keys:
        mask = np.uint64(2**left_bits - 1)
        left, right = right, left ^ (_mix(right * _GOLDEN + round_key) & mask)
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
