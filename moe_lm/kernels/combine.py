"""Token rows in the order of their experts, and the weighted sum of the experts' outputs per token.

Letters: P placed rows, T tokens, D hidden.

The plain version reads as the formula, but autograd then keeps the product of rows and weights as well, as large as
the experts' output and only for its shape. Time for 8,192 rows of 256, forward and backward: 1.3 times as fast in fp32,
a tie in bf16. On a GPU kernels in Triton (`triton/rows.py`) do without atomic additions.
"""

from typing import Any

import torch
from torch import Tensor

from moe_lm.kernels.triton import launch


def gather_rows(x_TD: Tensor, token_P: Tensor, backend: str | None = None) -> Tensor:
    """Row token_P[p] of x for each p, [P, D].

    Args:
        x_TD: tokens.
        token_P: numbers of tokens, int64.
        backend: "reference", "triton" (GPU; contiguous), or None to choose.

    Raises:
        ValueError: on an unknown backend.
    """
    if backend is None:
        backend = "triton" if launch.supports(x_TD) and token_P.numel() else "reference"
    if backend == "reference":
        return x_TD.index_select(0, token_P)
    if backend == "triton":
        from moe_lm.kernels.triton import rows

        return rows.gather_rows(x_TD, token_P)
    raise ValueError(f"backend={backend!r}: choose reference or triton")


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
    if backend == "reference" or (backend is None and not torch.is_grad_enabled()):
        return _reference(y_PD, token_P, weight_P, num_tokens)
    if backend in (None, "fused"):
        y_TD: Tensor = _WeightedSum.apply(y_PD, token_P, weight_P, num_tokens)
        return y_TD
    raise ValueError(f"backend={backend!r}: choose reference, fused or triton")


def _reference(y_PD: Tensor, token_P: Tensor, weight_P: Tensor, num_tokens: int) -> Tensor:
    return y_PD.new_zeros(num_tokens, y_PD.shape[1]).index_add(0, token_P, y_PD * weight_P[:, None])


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, token_P: Tensor, weight_P: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(y_PD, token_P, weight_P)
        return _reference(y_PD, token_P, weight_P, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_PD, token_P, weight_P = ctx.saved_tensors
        needs_y, _, needs_weight, _ = ctx.needs_input_grad
        grad_PD = grads[0].index_select(0, token_P)
        # Not vecdot or bmm, which are 3 and 12 times slower in one of fp32 and bf16.
        grad_weight_P = (y_PD * grad_PD).sum(dim=1) if needs_weight else None
        return grad_PD.mul_(weight_P[:, None]) if needs_y else None, None, grad_weight_P, None
