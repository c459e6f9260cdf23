"""Rows of tokens: gathered for their experts, and summed per token. Each is the other's gradient.

Letters: P rows, T tokens, D hidden.

torch's index_add goes through memory several times, and on a GPU adds with atomics, in no fixed order; native code on a
CPU goes once. On a GPU kernels in Triton (`triton/rows.py`) do without atomic additions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.kernels import native
from moe_lm.kernels.triton import launch


def gather_rows(x_TD: Tensor, token_P: Tensor, backend: str | None = None) -> Tensor:
    """Row token_P[p] of x for each p, [P, D].

    Args:
        x_TD: tokens.
        token_P: numbers of tokens, int64.
        backend: of the gradient, which is a sum of rows; see `sum_rows`.
    """
    if not (torch.is_grad_enabled() and x_TD.requires_grad):
        return x_TD.index_select(0, token_P)
    x_PD: Tensor = _Gather.apply(x_TD, token_P, backend)
    return x_PD


def sum_rows(y_PD: Tensor, token_P: Tensor, num_tokens: int, backend: str | None = None) -> Tensor:
    """Σ over the rows of a token.

    Args:
        y_PD: rows.
        token_P: the token of each row, int64.
        num_tokens: T.
        backend: "reference", "native" (CPU), "triton" (GPU), or None to choose.

    Returns:
        [T, D]; zero for a token without rows.

    Raises:
        ValueError: on an unknown backend.
    """
    if not (torch.is_grad_enabled() and y_PD.requires_grad):
        return _sum(y_PD, token_P, num_tokens, backend)
    y_TD: Tensor = _Sum.apply(y_PD, token_P, num_tokens, backend)
    return y_TD


def _sum(y_PD: Tensor, token_P: Tensor, num_tokens: int, backend: str | None) -> Tensor:
    y_PD = y_PD.contiguous()
    if backend is None:
        backend = "triton" if launch.supports(y_PD) else "native" if native.supports(y_PD) else "reference"
    if backend == "reference":
        return y_PD.new_zeros(num_tokens, y_PD.shape[1]).index_add_(0, token_P, y_PD)
    if backend == "native":
        y_TD = y_PD.new_empty(num_tokens, y_PD.shape[1])
        sizes = len(y_PD), num_tokens, y_PD.shape[1]
        native.run("sum_of_tokens", y_PD.dtype, y_PD.numel(), y_PD, token_P.contiguous(), y_TD, *sizes)
        return y_TD
    if backend == "triton":
        from moe_lm.kernels.triton import rows

        return rows.sum_rows(y_PD, rows.order(token_P, num_tokens))
    raise ValueError(f"backend={backend!r}: choose reference, native or triton")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_P: Tensor, backend: str | None) -> Tensor:
        ctx.save_for_backward(token_P)
        ctx.num_tokens, ctx.backend = len(x_TD), backend
        return x_TD.index_select(0, token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        (token_P,) = ctx.saved_tensors
        return _sum(grad_PD, token_P, ctx.num_tokens, ctx.backend), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, token_P: Tensor, num_tokens: int, backend: str | None) -> Tensor:
        ctx.save_for_backward(token_P)
        return _sum(y_PD, token_P, num_tokens, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (token_P,) = ctx.saved_tensors
        return grad_TD.index_select(0, token_P), None, None, None
