"""The mixture of experts over tokens: rows to their experts, SwiGLU, and each token's weighted sum; four backends.

Letters: T tokens, D hidden, P rows (grouped by expert, each group possibly filled up), E experts, F intermediate.

One operator from tokens to tokens, on a CPU and with Triton, so that little is kept for the backward: of each layer
the gate-up product [P, 2F] and the tokens themselves. Rows are gathered again (the kernels copy them anyway), the
activation is computed again, and since a row's weight multiplies its activation instead of its output (the same product
in another order), the gradient of the weight needs no output.

Why not one grouped GEMM everywhere: on a CPU `F.grouped_mm` loops inside, pays oneDNN's set-up for every new group size
(about 2 ms each), and autograd then keeps the activations and runs SwiGLU's backward as separate passes over memory. In
the "cpu" backend the gradient of a stacked parameter is written once. In it, either a GEMM per expert into slices of
one buffer (smaller blocks of rows were slower: oneDNN packs the weights at each call); or, in bf16 where there are AMX
tiles, kernels of our own (`amx_experts.inc`) that pack weights once, take 128 rows at a time through both products, and
have no set-up per shape. Measured, products and SwiGLU alone, 8192 rows, D 256, F 512, E 8, two AMX cores,
milliseconds forward and backward: reference 45, grouped 39, cpu 34 by oneDNN before the native SwiGLU, 27 with it, 20
on tiles; fp32 98, 106–145, 87. A GPU takes "triton" (`triton/experts.py`): grouped products, with kernels of our own
between them; or "grouped" without Triton. Neither choice has been measured.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels import native
from moe_lm.kernels.combine import gather_rows, sum_rows
from moe_lm.kernels.triton import launch

ROW_ALIGNMENT = 128
"""Largest multiple to which groups are rounded up; see `row_alignment`."""

_TILE = 32

_aten = torch.ops.aten


class Grouping(NamedTuple):
    """Which tokens each expert takes, and how much its answer counts."""

    token_P: Tensor
    """Token of each row, int64; any token's number for rows that fill a group up, and past the last end."""
    weight_P: Tensor
    """Weight of each row, in the compute type; exactly 0 where it fills up."""
    end_E: Tensor
    """int32, the row at which each expert's group ends; what is past the last end counts for nothing."""


def row_alignment(device: torch.device, dtype: torch.dtype, rows: int, experts: int = 8) -> int:
    """The multiple to which a dispatcher should round up every expert's group, for `rows` assignments to `experts`.

    oneDNN builds a primitive for every matrix shape it has not seen (about 2 ms, many times the product itself), so
    bf16 on a CPU wants few shapes. The multiple is an eighth of the average group, so that padding stays near 6 %
    (kernels for AMX tiles take multiples of 32: more where groups are below 256 rows), and at least 8; a few decoded
    tokens, whose shapes are few anyway, are not padded. fp32 goes to MKL, CUDA to grouped kernels, and both take any
    shape as it comes. Measured, with oneDNN, bf16, D 256, F 512, E 8, milliseconds forward and backward at alignment 1
    / 8 / 32 / 128: 4096 rows 129 / 56 / 22 / 21; 1024 rows 63 / 10.2 / 9.3 / 10.1; 64 rows 4.5 / 4.0 / 4.4 / 7.6.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or rows < 64:
        return 1
    if dtype is torch.bfloat16 and 2 * _TILE * experts <= rows and native.has_amx():
        return _TILE
    alignment = 8
    while alignment < ROW_ALIGNMENT and alignment * 2 * 8 * experts <= rows:
        alignment *= 2
    return alignment


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
        if torch.is_grad_enabled():
            return _with_gradients(x_TD, *grouping, gate_up_proj, down_proj)[0]
        return _forward(x_TD, grouping, gate_up_proj, down_proj, keeps=False)[0]
    if backend == "triton":
        from moe_lm.kernels.triton import experts

        return experts.expert_mixture(x_TD, *grouping, gate_up_proj, down_proj)
    raise ValueError(f"backend={backend!r}: choose reference, grouped, cpu or triton")


def _default_backend(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> str:
    if launch.supports(x_TD, grouping.weight_P, gate_up_proj, down_proj):
        return "triton"
    if x_TD.device.type == "cpu":
        return "cpu"
    return "reference" if x_TD.dtype == torch.float64 else "grouped"


def _reference(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    y_TD, start = torch.zeros_like(x_TD), 0
    # unbind, not indexing: its backward stacks once, where indexing fills and adds a full-size zero tensor per expert.
    for end, gate_up, down in zip(grouping.end_E.tolist(), gate_up_proj.unbind(0), down_proj.unbind(0), strict=True):
        token_p, weight_p1 = grouping.token_P[start:end], grouping.weight_P[start:end, None]
        gate, up = (x_TD.index_select(0, token_p) @ gate_up.t()).chunk(2, dim=-1)
        y_TD = y_TD.index_add(0, token_p, (F.silu(gate) * up) @ down.t() * weight_p1)
        start = end
    return y_TD


def _grouped(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    # Rows past the last end stay uninitialised in grouped_mm, forward and backward. Masking both input and output keeps
    # whatever lies there out of y and of the gradient of x, without asking the device where the end is.
    token_P, weight_P, end_E = grouping
    inside_P1 = (torch.arange(len(token_P), device=x_TD.device) < end_E[-1]).unsqueeze(1)
    x_PD = torch.where(inside_P1, gather_rows(x_TD, token_P), 0)
    gate, up = F.grouped_mm(x_PD, gate_up_proj.transpose(1, 2), offs=end_E).chunk(2, dim=-1)
    y_PD = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=end_E)
    return sum_rows(torch.where(inside_P1, y_PD, 0) * weight_P[:, None], token_P, len(x_TD))


def _forward(
    x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor, keeps: bool = True
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward the gate-up product [P, 2F], in the tiles' order where they are taken."""
    token_P, weight_P, end_E = grouping
    y_PD = x_TD.new_empty(len(token_P), x_TD.shape[1])
    if _take_tiles(x_TD, grouping, gate_up_proj, down_proj):
        h_P2F = _tiles_forward(x_TD, grouping, gate_up_proj, down_proj, keeps, y_PD)
    else:
        h_P2F = x_TD.new_empty(len(token_P), gate_up_proj.shape[1])
        for expert, rows in _groups(end_E):
            x_pD = x_TD.index_select(0, token_P[rows])
            h_p2F = torch.mm(x_pD, gate_up_proj[expert].t(), out=h_P2F[rows])
            torch.mm(_swiglu(h_p2F, weight_P[rows]), down_proj[expert].t(), out=y_PD[rows])
    y_PD[int(end_E[-1]) :].zero_()
    return sum_rows(y_PD, token_P, len(x_TD)), h_P2F


# An operator of its own, not an autograd function: activation checkpointing can then keep its results as a whole.
@torch.library.custom_op("moe_lm::expert_mixture", mutates_args=())
def _with_gradients(
    x_TD: Tensor, token_P: Tensor, weight_P: Tensor, end_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> tuple[Tensor, Tensor]:
    return _forward(x_TD, Grouping(token_P, weight_P, end_E), gate_up_proj, down_proj)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, token_P, weight_P, end_E, gate_up_proj, down_proj = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a gradient of zeros as large as the gate-up product is made for nothing
    ctx.save_for_backward(*inputs, output[1])
    ctx.in_tiles = _take_tiles(x_TD, Grouping(token_P, weight_P, end_E), gate_up_proj, down_proj)


def _backward(ctx: Any, grad_y_TD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x_TD, token_P, weight_P, end_E, gate_up_proj, down_proj, h_P2F = ctx.saved_tensors
    needs_x, _, needs_weight, _, needs_gate_up, needs_down = ctx.needs_input_grad
    grad_x_PD = x_TD.new_empty(len(token_P), x_TD.shape[1]) if needs_x else None
    grad_weight_P = torch.empty_like(weight_P) if needs_weight else None
    grad_gate_up = torch.empty_like(gate_up_proj) if needs_gate_up else None
    grad_down = torch.empty_like(down_proj) if needs_down else None
    gradients = Gradients(grad_x_PD, grad_weight_P, grad_gate_up, grad_down)
    backward = _tiles_backward if ctx.in_tiles else _backward_by_expert
    grouping = Grouping(token_P, weight_P, end_E)
    backward(x_TD, grouping, gate_up_proj, down_proj, h_P2F, grad_y_TD.contiguous(), gradients)
    for past_the_end in (grad_x_PD, grad_weight_P):
        if past_the_end is not None:
            past_the_end[int(end_E[-1]) :].zero_()
    grad_x_TD = None if grad_x_PD is None else sum_rows(grad_x_PD, token_P, len(x_TD))
    return grad_x_TD, None, grad_weight_P, None, grad_gate_up, grad_down


_with_gradients.register_autograd(_backward, setup_context=_keep_for_backward)


class Gradients(NamedTuple):
    """What a backward shall write, as far as it is wanted; none of it past the last group's end."""

    x_PD: Tensor | None
    weight_P: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None


def _backward_by_expert(
    x_TD: Tensor,
    grouping: Grouping,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    h_P2F: Tensor,
    grad_y_TD: Tensor,
    gradients: Gradients,
) -> None:
    token_P, weight_P, end_E = grouping
    for expert, rows in _groups(end_E, also_empty=True):
        if rows.start == rows.stop:
            for gradient in (gradients.gate_up, gradients.down):
                if gradient is not None:
                    gradient[expert].zero_()
            continue
        grad_y_pD = grad_y_TD.index_select(0, token_P[rows])
        grad_activation_pF = torch.mm(grad_y_pD, down_proj[expert])
        grad_weight_p = None if gradients.weight_P is None else gradients.weight_P[rows]
        activation_pF, grad_h_p2F = _swiglu_backward(h_P2F[rows], weight_P[rows], grad_activation_pF, grad_weight_p)
        if gradients.down is not None:
            torch.mm(grad_y_pD.t(), activation_pF, out=gradients.down[expert])
        if gradients.gate_up is not None:
            torch.mm(grad_h_p2F.t(), x_TD.index_select(0, token_P[rows]), out=gradients.gate_up[expert])
        if gradients.x_PD is not None:
            torch.mm(grad_h_p2F, gate_up_proj[expert], out=gradients.x_PD[rows])


def _groups(end_E: Tensor, also_empty: bool = False) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, or each, and where its rows are."""
    start = 0
    for expert, end in enumerate(end_E.tolist()):
        if end > start or also_empty:
            yield expert, slice(start, end)
        start = end


def _take_tiles(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
    """Whether the kernels for matrix tiles take these: bf16, every size and every group's a multiple of 32."""
    sizes = *down_proj.shape[1:], *grouping.end_E.tolist()
    return (
        x_TD.dtype is torch.bfloat16
        and all(size % _TILE == 0 for size in sizes)
        and native.supports(x_TD, grouping.weight_P, gate_up_proj, down_proj)
        and native.has_amx()
    )


def _tiles_forward(
    x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor, keeps: bool, y_PD: Tensor
) -> Tensor:
    """Writes y, and gives the gate-up product if it is to be kept."""
    packed = x_TD.new_empty(gate_up_proj.numel() + down_proj.numel())
    h_P2F = x_TD.new_empty(len(y_PD) if keeps else 0, gate_up_proj.shape[1])
    pointers = x_TD, *_contiguous(grouping), gate_up_proj, down_proj, packed, h_P2F if keeps else None, y_PD
    native.run("amx_experts", None, gate_up_proj.shape[1] * y_PD.numel(), *pointers, *down_proj.shape)
    return h_P2F


def _tiles_backward(
    x_TD: Tensor,
    grouping: Grouping,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    h_P2F: Tensor,
    grad_y_TD: Tensor,
    gradients: Gradients,
) -> None:
    rows, D = len(h_P2F), x_TD.shape[1]
    packed = x_TD.new_empty(gate_up_proj.numel() + down_proj.numel())
    activation = x_TD.new_empty(rows, down_proj.shape[2])
    x_transposed, grad_transposed = (x_TD.new_empty(rows, D) for _ in range(2))
    kept = x_TD, *_contiguous(grouping), gate_up_proj, down_proj, h_P2F, grad_y_TD
    room = packed, activation, torch.empty_like(h_P2F), x_transposed, grad_transposed
    native.run("amx_experts_backward", None, h_P2F.numel(), *kept, *room, *gradients, *down_proj.shape)


def _contiguous(grouping: Grouping) -> Grouping:
    return Grouping(*(tensor.contiguous() for tensor in grouping))


def _swiglu(h_p2F: Tensor, weight_p: Tensor) -> Tensor:
    """silu(gate) ⊙ up, times the row's weight."""
    gate, up = h_p2F.chunk(2, dim=-1)
    if not native.supports(h_p2F, weight_p):
        return F.silu(gate).mul_(up).mul_(weight_p[:, None])
    activation_pF = torch.empty_like(gate, memory_format=torch.contiguous_format)
    native.run("swiglu", h_p2F.dtype, gate.numel(), h_p2F, weight_p, activation_pF, *gate.shape)
    return activation_pF


def _swiglu_backward(
    h_p2F: Tensor, weight_p: Tensor, grad_activation_pF: Tensor, grad_weight_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The activation again, and the gradient of [gate, up], one expert at a time so that the pieces stay in cache; that
    of the weight is written.
    """
    gate, up = h_p2F.chunk(2, dim=-1)
    grad_h_p2F = torch.empty_like(h_p2F)
    if native.supports(h_p2F, weight_p, grad_activation_pF, grad_weight_p):
        pointers = h_p2F, weight_p, grad_activation_pF, grad_h_p2F, grad_weight_p
        native.run("swiglu_backward", h_p2F.dtype, gate.numel(), *pointers, *gate.shape)
        return grad_activation_pF, grad_h_p2F
    grad_gate, grad_up = grad_h_p2F.chunk(2, dim=-1)
    silu = F.silu(gate)
    if grad_weight_p is not None:
        torch.sum(silu * up * grad_activation_pF, dim=1, out=grad_weight_p)
    grad_activation_pF.mul_(weight_p[:, None])
    torch.mul(grad_activation_pF, silu, out=grad_up)
    _aten.silu_backward.grad_input(grad_activation_pF.mul_(up), gate, grad_input=grad_gate)
    return silu.mul_(up).mul_(weight_p[:, None]), grad_h_p2F
