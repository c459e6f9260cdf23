"""RMS norm in one pass over memory each way.

Letters: T rows, D row length, P programs of the backward.

Backward, with r = 1 / sqrt(mean(x²) + eps), n = r·x and h = weight ⊙ gradient: the gradient of x is r·(h − n·mean(h ⊙
n)), that of the weight the sum of gradient ⊙ n over all rows. Each program sums the rows that it goes through in fp32,
and torch sums the P partial sums: no atomics, and the same result every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.kernels.triton.launch import block, warps

_PROGRAMS = 528
"""Of the backward: four to each multiprocessor of an H200."""


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Weight ⊙ x / sqrt(mean(x²) + eps); contiguous, of one type, and not empty."""
    y_TD: Tensor = _Norm.apply(x_TD, weight_D, eps)
    return y_TD


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps):
        T, D = x_TD.shape
        y_TD, inverse_T = torch.empty_like(x_TD), x_TD.new_empty(T, dtype=torch.float32)
        _forward[(T,)](x_TD, weight_D, y_TD, inverse_T, D, eps, BLOCK=block(D), num_warps=warps(block(D)))
        ctx.save_for_backward(x_TD, weight_D, inverse_T)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weight_D, inverse_T = ctx.saved_tensors
        T, D = x_TD.shape
        programs = min(T, _PROGRAMS)
        grad_x_TD, partial_PD = torch.empty_like(x_TD), inverse_T.new_empty(programs, D)
        pointers = grad_TD.contiguous(), x_TD, weight_D, inverse_T, grad_x_TD, partial_PD
        _backward[(programs,)](*pointers, T, D, BLOCK=block(D), num_warps=warps(block(D)))
        return grad_x_TD, partial_PD.sum(dim=0).to(weight_D.dtype), None


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, inverse_ptr, D, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    place, inside = row.to(tl.int64) * D + column, column < D
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(inverse_ptr + row, inverse)
    # Rounded before the weight, where transformers rounds.
    normed = (x * inverse).to(y_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, (normed * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_ptr, x_ptr, weight_ptr, inverse_ptr, grad_x_ptr, partial_ptr, T, D, BLOCK: tl.constexpr):
    program, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    for first in range(0, T, tl.num_programs(0)):
        row = first + program
        place, inside = row * D + column, (column < D) & (row < T)
        gradient = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=row < T, other=0.0)
        normed = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) * inverse
        of_weight += gradient * normed
        weighted = gradient * weight
        of_x = (weighted - normed * (tl.sum(weighted * normed, axis=0) / D)) * inverse
        tl.store(grad_x_ptr + place, of_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * D + column, of_weight, mask=column < D)
