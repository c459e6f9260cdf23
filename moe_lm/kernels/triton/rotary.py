"""Rotary position embedding in one pass over memory: a program turns all heads of one token.

Letters: B batch, S sequence, N heads, H head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.kernels.triton.launch import block, warps


def apply_rotary(x_BSNH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor) -> Tensor:
    """See `moe_lm/kernels/rotary.py`; contiguous, of one type, and not empty."""
    y_BSNH: Tensor = _Rotation.apply(x_BSNH, cos_BSH, sin_BSH)
    return y_BSNH


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSNH, cos_BSH, sin_BSH):
        ctx.save_for_backward(cos_BSH, sin_BSH)
        return _rotated(x_BSNH, cos_BSH, sin_BSH, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSNH):
        cos_BSH, sin_BSH = ctx.saved_tensors
        return _rotated(grad_BSNH.contiguous(), cos_BSH, sin_BSH, -1.0), None, None


def _rotated(x_BSNH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor, sign: float) -> Tensor:
    B, S, N, H = x_BSNH.shape
    y_BSNH = torch.empty_like(x_BSNH)
    blocks = {"HEADS": block(N), "BLOCK": block(H // 2)}
    threads = warps(blocks["HEADS"] * blocks["BLOCK"])
    _rotate[(B * S,)](x_BSNH, cos_BSH, sin_BSH, y_BSNH, N, H // 2, sign, **blocks, num_warps=threads)
    return y_BSNH


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, y_ptr, N, half, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + token * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :] * sign
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < N) & (column[None, :] < half)
    place = (token * N + head) * 2 * half + column[None, :]
    first = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + place + half, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)
