"""Which tokens each expert takes, and how many rows a group should have.

Letters: P rows (grouped by expert, each group possibly filled up), E experts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.kernels import native

ROW_ALIGNMENT = 128
"""Largest multiple to which groups are rounded up; see `row_alignment`."""


class Grouping(NamedTuple):
    """Which tokens each expert takes, and how much its answer counts."""

    token_P: Tensor
    """Token of each row, int64; any token's number for rows that fill a group up, and past the last end."""
    weight_P: Tensor
    """Weight of each row, in the compute type; exactly 0 where it fills up."""
    end_E: Tensor
    """int32, the row at which each expert's group ends; what is past the last end counts for nothing."""


def groups(end_E: Tensor, also_empty: bool = False) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, or each, and where its rows are."""
    start = 0
    for expert, end in enumerate(end_E.tolist()):
        if end > start or also_empty:
            yield expert, slice(start, end)
        start = end


def row_alignment(device: torch.device, dtype: torch.dtype, rows: int, experts: int = 8) -> int:
    """The multiple to which a dispatcher should round up every expert's group, for `rows` assignments to `experts`.

    oneDNN builds a primitive for every matrix shape it has not seen (about 2 ms, many times the product itself), so
    bf16 on a CPU wants few shapes. The multiple is an eighth of the average group, so that padding stays near 6 %
    (kernels for AMX tiles take multiples of 32: more where groups are below 256 rows), and at least 8; a few decoded
    tokens, whose shapes are few anyway, are not padded. fp32 goes to MKL, CUDA to grouped kernels, and both take any
    shape as it comes. Measured, with oneDNN, bf16, D 256, F 512, E 8, milliseconds forward and backward at alignment 1
    / 8 / 32 / 128: 4096 rows 129 / 56 / 22 / 21; 1024 rows 63 / 10.2 / 9.3 / 10.1; 64 rows 4.5 / 4.0 / 4.4 / 7.6.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or rows < 64:
        return 1
    if dtype is torch.bfloat16 and 2 * native.TILE * experts <= rows and native.has_amx():
        return native.TILE
    alignment = 8
    while alignment < ROW_ALIGNMENT and alignment * 2 * 8 * experts <= rows:
        alignment *= 2
    return alignment


def grouped_mm_takes(*weights: Tensor) -> bool:
    """Whether `F.grouped_mm` takes stacked matrices [E, ·, ·]: sizes of whole 16 bytes, and no fp64."""
    return all(
        weight.dtype is not torch.float64 and size * weight.element_size() % 16 == 0
        for weight in weights
        for size in weight.shape[1:]
    )
