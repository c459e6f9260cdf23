"""Rows summed per token, without atomic additions.

Letters: P rows, T tokens, D hidden.

What torch does with atomics in bf16 (`index_add`, and the backward of `index_select`), a program for each token does by
itself: it reads the rows of its token and adds them in fp32, in their order. For that rows are sorted by token, a
hundredth of the time that the rows take.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lm.kernels.triton.launch import block, warps


class Order(NamedTuple):
    """Rows by their token."""

    row_P: Tensor
    first_T1: Tensor
    """Where each token's begin among them, and the last ones end [T + 1]."""


def order(token_P: Tensor, num_tokens: int) -> Order:
    """Sort rows by token."""
    sorted_P, row_P = torch.sort(token_P.to(torch.int32), stable=True)
    tokens = torch.arange(num_tokens + 1, device=token_P.device, dtype=torch.int32)
    return Order(row_P, torch.searchsorted(sorted_P, tokens))


def sum_rows(y_PD: Tensor, by_token: Order) -> Tensor:
    """Of each token the sum of its rows, zero without any; contiguous."""
    T, D = len(by_token.first_T1) - 1, y_PD.shape[1]
    y_TD = y_PD.new_empty(T, D)
    _sum[(T,)](y_PD, *by_token, y_TD, D, BLOCK=block(D), num_warps=warps(block(D)))
    return y_TD


@triton.jit
def _sum(y_ptr, row_ptr, first_ptr, out_ptr, D, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(first_ptr + token), tl.load(first_ptr + token + 1)):
        row = tl.load(row_ptr + place)
        total += tl.load(y_ptr + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)
