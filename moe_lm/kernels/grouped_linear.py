"""A linear map of each expert over rows grouped by expert: one interface, three backends as in `experts.py`.

The fused SwiGLU there is what pretraining runs. Adapters add a low-rank map to each of its two products, so the pieces
have to be apart; this is one of them.

Letters: R routed rows (grouped by expert), I inputs, O outputs, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels.gemm import gemm
from moe_lm.kernels.grouping import grouped_mm_takes, groups


def grouped_linear(x_RI: Tensor, group_ends_E: Tensor, weight_EOI: Tensor, backend: str | None = None) -> Tensor:
    """Y = x·Wᵀ for every group of rows with its own expert's matrix.

    Args:
        x_RI: rows grouped by expert, contiguous.
        group_ends_E: int32, the row at which each expert's group ends; rows at or past the last end give zeros.
        weight_EOI: [E, O, I], in x's dtype.
        backend: "reference", "grouped", "cpu", or None to choose by device, dtype and shape.

    Returns:
        y_RO. Gradients of an expert without rows are exactly zero, never None.

    Raises:
        ValueError: on an unknown backend.
    """
    assert x_RI.dtype == weight_EOI.dtype, (x_RI.dtype, weight_EOI.dtype)
    backend = backend or _default_backend(x_RI, weight_EOI)
    if backend == "reference":
        return _reference(x_RI, group_ends_E, weight_EOI)
    if backend == "grouped":
        inside_R1 = (torch.arange(x_RI.shape[0], device=x_RI.device) < group_ends_E[-1]).unsqueeze(1)
        y_RO = F.grouped_mm(torch.where(inside_R1, x_RI, 0), weight_EOI.transpose(1, 2), offs=group_ends_E)
        return torch.where(inside_R1, y_RO, 0)  # rows past the last end stay uninitialised
    if backend == "cpu":
        return _linear_loop(x_RI, group_ends_E, weight_EOI)
    raise ValueError(f"backend={backend!r}: choose reference, grouped or cpu")


def _default_backend(x_RI: Tensor, weight_EOI: Tensor) -> str:
    if x_RI.device.type == "cpu":
        return "cpu"
    return "grouped" if grouped_mm_takes(weight_EOI) else "reference"


def _reference(x_RI: Tensor, group_ends_E: Tensor, weight_EOI: Tensor) -> Tensor:
    every = zip(groups(group_ends_E, also_empty=True), weight_EOI.unbind(0), strict=True)
    parts = [x_RI[rows] @ weight.t() for (_, rows), weight in every]
    past_the_end = x_RI.new_zeros(len(x_RI) - int(group_ends_E[-1]), weight_EOI.shape[1])
    return torch.cat((*parts, past_the_end))


# An operator of its own, as in `experts_cpu.py`, so that activation checkpointing can keep its result.
@torch.library.custom_op("moe_lm::linear_loop", mutates_args=())
def _linear_loop(x_RI: Tensor, group_ends_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """A GEMM per expert into slices of one buffer; the gradient of the stacked matrices is written once."""
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    for expert, rows in groups(group_ends_E):
        gemm(x_RI[rows], weight_EOI[expert].t(), out=y_RO[rows])
    y_RO[int(group_ends_E[-1]) :].zero_()
    return y_RO


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x_RI, group_ends_E, weight_EOI = inputs
    # A frozen matrix needs no inputs kept: only what its own gradient is made of.
    ctx.save_for_backward(x_RI if ctx.needs_input_grad[2] else None, group_ends_E, weight_EOI)


def _backward(ctx: Any, grad_y_RO: Tensor) -> tuple[Tensor | None, ...]:
    x_RI, group_ends_E, weight_EOI = ctx.saved_tensors
    needs_x, _, needs_weight = ctx.needs_input_grad
    grad_y_RO = grad_y_RO.contiguous()
    grad_x_RI = grad_y_RO.new_empty(grad_y_RO.shape[0], weight_EOI.shape[2]) if needs_x else None
    grad_weight = torch.empty_like(weight_EOI) if needs_weight else None
    for expert, rows in groups(group_ends_E, also_empty=True):
        if rows.start == rows.stop:
            if grad_weight is not None:
                grad_weight[expert].zero_()
            continue
        if grad_weight is not None:
            gemm(grad_y_RO[rows].t(), x_RI[rows], out=grad_weight[expert])
        if grad_x_RI is not None:
            gemm(grad_y_RO[rows], weight_EOI[expert], out=grad_x_RI[rows])
    if grad_x_RI is not None:
        grad_x_RI[int(group_ends_E[-1]) :].zero_()
    return grad_x_RI, None, grad_weight


_linear_loop.register_autograd(_backward, setup_context=_keep_for_backward)
