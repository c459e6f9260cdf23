"""Token rows in the order of their experts, and the weighted sum of the experts' outputs per token.

Letters: P placed rows, T tokens, D hidden.

The plain version reads as the formula, but autograd then keeps the product of rows and weights as well, as large as
the experts' output and only for its shape; and both sums go through memory several times, where native code on a CPU
does once. On a GPU kernels in Triton (`triton/rows.py`) do without atomic additions.
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
        backend: "reference", "native" (CPU), "triton" (GPU; contiguous), or None to choose.

    Raises:
        ValueError: on an unknown backend.
    """
    if backend is None:
        backend = "triton" if launch.supports(x_TD) and token_P.numel() else "reference"
        if native.supports(x_TD) and torch.is_grad_enabled() and x_TD.requires_grad:
            backend = "native"
    if backend == "reference":
        return x_TD.index_select(0, token_P)
    if backend == "native":
        rows_PD: Tensor = _Gather.apply(x_TD, token_P)
        return rows_PD
    if backend == "triton":
        from moe_lm.kernels.triton import rows

        return rows.gather_rows(x_TD, token_P)
    raise ValueError(f"backend={backend!r}: choose reference, native or triton")


def weighted_sum(
    y_PD: Tensor, token_P: Tensor, weight_P: Tensor, num_tokens: int, backend: str | None = None
) -> Tensor:
    """Σ over the rows of a token of weight · row.

    Args:
        y_PD: rows.
        token_P: the token of each row, int64.
        weight_P: the weight of each row, in y's dtype.
        num_tokens: T.
        backend: "reference", "fused", "triton" (GPU; contiguous), or None to choose.

    Returns:
        [T, D]; zero for a token without rows.

    Raises:
        ValueError: on an unknown backend.
    """
    if backend == "triton" or (backend is None and launch.supports(y_PD, weight_P)):
        from moe_lm.kernels.triton import rows

        return rows.weighted_sum(y_PD, token_P, weight_P, num_tokens)
    if backend == "reference":
        return _reference(y_PD, token_P, weight_P, num_tokens)
    if backend in (None, "fused"):
        y_TD: Tensor = _WeightedSum.apply(y_PD, token_P, weight_P, num_tokens)
        return y_TD
    raise ValueError(f"backend={backend!r}: choose reference, fused or triton")


def _reference(y_PD: Tensor, token_P: Tensor, weight_P: Tensor, num_tokens: int) -> Tensor:
    return y_PD.new_zeros(num_tokens, y_PD.shape[1]).index_add(0, token_P, y_PD * weight_P[:, None])


def _sum_of_tokens(y_PD: Tensor, token_P: Tensor, weight_P: Tensor | None, num_tokens: int) -> Tensor:
    """Of each token the sum of its rows, with weights if given, in native code."""
    y_TD, token_P = y_PD.new_empty(num_tokens, y_PD.shape[1]), token_P.contiguous()
    sizes = len(y_PD), num_tokens, y_PD.shape[1]
    native.run("sum_of_tokens", y_PD.dtype, y_PD.numel(), y_PD, token_P, weight_P, y_TD, *sizes)
    return y_TD


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_P: Tensor) -> Tensor:
        ctx.save_for_backward(token_P)
        ctx.num_tokens = len(x_TD)
        return x_TD.index_select(0, token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        (token_P,) = ctx.saved_tensors
        return _sum_of_tokens(grad_PD.contiguous(), token_P, None, ctx.num_tokens), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, token_P: Tensor, weight_P: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(y_PD, token_P, weight_P)
        if native.supports(y_PD, weight_P):
            return _sum_of_tokens(y_PD, token_P, weight_P, num_tokens)
        return _reference(y_PD, token_P, weight_P, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_PD, token_P, weight_P = ctx.saved_tensors
        needs_y, _, needs_weight, _ = ctx.needs_input_grad
        if native.supports(y_PD, weight_P):
            grad_y_PD = torch.empty_like(y_PD) if needs_y else None
            grad_weight_P = torch.empty_like(weight_P) if needs_weight else None
            pointers = grad_TD.contiguous(), y_PD, token_P.contiguous(), weight_P, grad_y_PD, grad_weight_P
            native.run("sum_of_tokens_backward", y_PD.dtype, y_PD.numel(), *pointers, *y_PD.shape)
            return grad_y_PD, None, grad_weight_P, None
        grad_PD = grad_TD.index_select(0, token_P)
        # Not vecdot or bmm, which are 3 and 12 times slower in one of fp32 and bf16.
        grad_weight_P = (y_PD * grad_PD).sum(dim=1) if needs_weight else None
        return grad_PD.mul_(weight_P[:, None]) if needs_y else None, None, grad_weight_P, None
