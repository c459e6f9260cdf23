"""Rows times one weight: torch's, or on a CPU a kernel of our own: in bf16 on AMX tiles (`amx_linear.inc`), in fp32
without AVX-512 (`gemm.py`).

In bf16, oneDNN packs both factors of each of a step's three products anew and starts in tens of microseconds; where the
weight is small, as a projection of attention is, that is half of its time.

Letters: T rows, N outputs, K inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels import native
from moe_lm.kernels.gemm import gemm, takes


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """X · weightᵀ for x [..., K], which gives [..., N]."""
    if x.device.type != "cpu" or x.dim() < 2 or not x.numel() or not x.is_contiguous():
        return F.linear(x, weight_NK)
    x_TK = x.flatten(0, -2)
    if not (native.takes_tiles((len(x_TK), *weight_NK.shape), x, weight_NK) or takes(x_TK, weight_NK.t())):
        return F.linear(x, weight_NK)
    y_TN = _with_gradients(x_TK, weight_NK) if torch.is_grad_enabled() else _forward(x_TK, weight_NK)
    return y_TN.unflatten(0, x.shape[:-1])


def _forward(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    if x_TK.dtype is torch.float32:
        return gemm(x_TK, weight_NK.t())
    T, (N, K) = len(x_TK), weight_NK.shape
    y_TN, packed = x_TK.new_empty(T, N), torch.empty_like(weight_NK)
    native.run("amx_linear", None, T * N * K, x_TK, weight_NK, packed, y_TN, T, N, K)
    return y_TN


# An operator of its own, not an autograd function: activation checkpointing can then keep its results.
@torch.library.custom_op("moe_lm::linear", mutates_args=())
def _with_gradients(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    return _forward(x_TK, weight_NK)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x_TK, weight_NK = inputs
    # In fp32 a frozen weight needs no inputs kept; the tiles' backward reads them all the same.
    is_kept = ctx.needs_input_grad[1] or x_TK.dtype is not torch.float32
    ctx.save_for_backward(x_TK if is_kept else None, weight_NK)


def _backward(ctx: Any, grad_y_TN: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, weight_NK = ctx.saved_tensors
    if grad_y_TN.dtype is torch.float32:
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = gemm(grad_y_TN, weight_NK) if needs_x else None
        return grad_x, gemm(grad_y_TN.t(), x_TK) if needs_weight else None
    T, (N, K) = len(x_TK), weight_NK.shape
    grad_x, grad_weight = (
        torch.empty_like(tensor) if needed else None
        for tensor, needed in zip((x_TK, weight_NK), ctx.needs_input_grad, strict=True)
    )
    room = (x_TK.new_empty(size) for size in (N * K, (T + native.TILE) * N, (T + native.TILE) * K))
    pointers = x_TK, weight_NK, grad_y_TN.contiguous(), *room, grad_x, grad_weight
    native.run("amx_linear_backward", None, T * N * K, *pointers, T, N, K)
    return grad_x, grad_weight


_with_gradients.register_autograd(_backward, setup_context=_keep_for_backward)
