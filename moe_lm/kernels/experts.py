"""The mixture of experts over tokens: rows to their experts, SwiGLU, and each token's weighted sum; four backends.

Letters: T tokens, D hidden, P rows (grouped by expert, each group possibly filled up), E experts, F intermediate.

One operator from tokens to tokens, on a CPU (`experts_cpu.py`) and with Triton, so that little is kept for the
backward: of each layer the gate-up product [P, 2F] and the tokens themselves. Rows are gathered again (the kernels copy
them anyway), the activation is computed again, and since a row's weight multiplies its activation instead of its output
(the same product in another order), the gradient of the weight needs no output.

Measured, products and SwiGLU alone, 8192 rows, D 256, F 512, E 8, two AMX cores, milliseconds forward and backward:
reference 45, grouped 39, cpu 34 by oneDNN before the native SwiGLU, 27 with it, 20 on tiles; fp32 98, 106–145, 87. A
GPU takes "triton" (`triton/experts.py`): grouped products, with kernels of our own between them; or "grouped" without
Triton; or "reference" where `F.grouped_mm` refuses the sizes. None of these choices has been measured.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels import experts_cpu
from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.grouping import Grouping, grouped_mm_takes, groups
from moe_lm.kernels.triton import launch


def expert_mixture(
    x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor, backend: str | None = None
) -> Tensor:
    """y[t] = Σ over the rows of token t of weight · (silu(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ, with the weights of the row's expert.

    Args:
        x_TD: tokens, contiguous.
        grouping: rows in the order of their experts.
        gate_up_proj: [E, 2F, D], gate first, in x's dtype.
        down_proj: [E, D, F], in x's dtype.
        backend: "reference", "grouped", "cpu", "triton", or None to choose by device and dtype.

    Returns:
        y_TD; zero for a token without rows. Gradients of an expert without rows are exactly zero, never None.

    Raises:
        ValueError: on an unknown backend.
    """
    assert x_TD.dtype == grouping.weight_P.dtype == gate_up_proj.dtype == down_proj.dtype, x_TD.dtype
    assert grouping.end_E.dtype == torch.int32, grouping.end_E.dtype
    backend = backend or _default_backend(x_TD, grouping, gate_up_proj, down_proj)
    if backend == "reference":
        return _reference(x_TD, grouping, gate_up_proj, down_proj)
    if backend == "grouped":
        return _grouped(x_TD, grouping, gate_up_proj, down_proj)
    if backend == "cpu":
        return experts_cpu.expert_mixture(x_TD, grouping, gate_up_proj, down_proj)
    if backend == "triton":
        from moe_lm.kernels.triton import experts

        return experts.expert_mixture(x_TD, *grouping, gate_up_proj, down_proj)
    raise ValueError(f"backend={backend!r}: choose reference, grouped, cpu or triton")


def _default_backend(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> str:
    if x_TD.device.type == "cpu":
        return "cpu"
    if not grouped_mm_takes(gate_up_proj, down_proj):
        return "reference"
    return "triton" if launch.supports(x_TD, grouping.weight_P, gate_up_proj, down_proj) else "grouped"


def _reference(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    # unbind, not indexing: its backward stacks once, where indexing fills and adds a full-size zero tensor per expert.
    matrices = gate_up_proj.unbind(0), down_proj.unbind(0)
    for (_, rows), gate_up, down in zip(groups(grouping.end_E, also_empty=True), *matrices, strict=True):
        token_p, weight_p1 = grouping.token_P[rows], grouping.weight_P[rows, None]
        gate, up = (x_TD.index_select(0, token_p) @ gate_up.t()).chunk(2, dim=-1)
        y_TD = y_TD.index_add(0, token_p, (F.silu(gate) * up) @ down.t() * weight_p1)
    return y_TD


def _grouped(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    # Rows past the last end stay uninitialised in grouped_mm, forward and backward. Masking both input and output keeps
    # whatever lies there out of y and of the gradient of x, without asking the device where the end is.
    token_P, weight_P, end_E = grouping
    inside_P1 = (torch.arange(len(token_P), device=x_TD.device) < end_E[-1]).unsqueeze(1)
    x_PD = torch.where(inside_P1, gather_rows(x_TD, token_P, "reference"), 0)
    gate, up = F.grouped_mm(x_PD, gate_up_proj.transpose(1, 2), offs=end_E).chunk(2, dim=-1)
    y_PD = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=end_E)
    return sum_rows(torch.where(inside_P1, y_PD, 0) * weight_P[:, None], token_P, len(x_TD), "reference")
