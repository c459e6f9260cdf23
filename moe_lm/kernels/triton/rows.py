"""Token rows to the order of their experts and back, without atomic additions.

Letters: P placed rows, T tokens, D hidden.

What torch does with atomics in bf16 (`index_add`, and the backward of `index_select`), a program for each token does by
itself: it reads the rows of its token and adds them in fp32, in their order. For that rows are sorted by token, once
forward and once backward: two sorts of P numbers, a hundredth of the time that the rows take.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.kernels.triton.launch import block, warps


def gather_rows(x_TD: Tensor, token_P: Tensor) -> Tensor:
    """Row token_P[p] of x for each p; contiguous and not empty."""
    rows_PD: Tensor = _Gather.apply(x_TD, token_P)
    return rows_PD


def weighted_sum(y_PD: Tensor, token_P: Tensor, weight_P: Tensor, num_tokens: int) -> Tensor:
    """See `moe_lm/kernels/combine.py`; contiguous, of one type, and not empty."""
    y_TD: Tensor = _WeightedSum.apply(y_PD, token_P, weight_P, num_tokens)
    return y_TD


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_P):
        ctx.save_for_backward(token_P)
        ctx.num_tokens = len(x_TD)
        return x_TD.index_select(0, token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_PD):
        (token_P,) = ctx.saved_tensors
        return _sum_of_tokens(grad_PD.contiguous(), token_P, None, ctx.num_tokens), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_PD, token_P, weight_P, num_tokens):
        ctx.save_for_backward(y_PD, token_P, weight_P)
        return _sum_of_tokens(y_PD, token_P, weight_P, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        y_PD, token_P, weight_P = ctx.saved_tensors
        P, D = y_PD.shape
        grad_y_PD, grad_weight_P = torch.empty_like(y_PD), torch.empty_like(weight_P)
        pointers = grad_TD.contiguous(), y_PD, token_P, weight_P, grad_y_PD, grad_weight_P
        _weighted_backward[(P,)](*pointers, D, BLOCK=block(D), num_warps=warps(block(D)))
        return grad_y_PD, None, grad_weight_P, None


def _sum_of_tokens(y_PD: Tensor, token_P: Tensor, weight_P: Tensor | None, num_tokens: int) -> Tensor:
    """Of each token the sum of its rows, with weights if given; zero without rows."""
    sorted_P, row_P = torch.sort(token_P.to(torch.int32), stable=True)
    first_T = torch.searchsorted(sorted_P, torch.arange(num_tokens + 1, device=y_PD.device, dtype=torch.int32))
    D = y_PD.shape[1]
    y_TD = y_PD.new_empty(num_tokens, D)
    weights = {"weight_ptr": weight_P, "WEIGHTED": weight_P is not None}
    _sum[(num_tokens,)](y_PD, row_P, first_T, y_TD, D, **weights, BLOCK=block(D), num_warps=warps(block(D)))
    return y_TD


@triton.jit
def _sum(y_ptr, row_ptr, first_ptr, out_ptr, D, weight_ptr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.load(first_ptr + token), tl.load(first_ptr + token + 1)):
        row = tl.load(row_ptr + place)
        values = tl.load(y_ptr + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weight_ptr + row).to(tl.float32)
        total += values
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _weighted_backward(grad_ptr, y_ptr, token_ptr, weight_ptr, grad_y_ptr, grad_weight_ptr, D, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, place = column < D, row * D + column
    gradient = tl.load(grad_ptr + tl.load(token_ptr + row) * D + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.sum(gradient * y, axis=0)
    of_y = gradient * tl.load(weight_ptr + row).to(tl.float32)
    tl.store(grad_weight_ptr + row, of_weight.to(grad_weight_ptr.dtype.element_ty))
    tl.store(grad_y_ptr + place, of_y.to(grad_y_ptr.dtype.element_ty), mask=inside)
