"""The mixture of experts on a CPU: an operator with a backward of its own, on AMX tiles or by a GEMM per expert.

Letters: T tokens, D hidden, P rows grouped by expert and p of one group, E experts, F intermediate.

Why not one grouped GEMM: on a CPU `F.grouped_mm` loops inside, pays oneDNN's set-up for every new group size (about
2 ms each), and autograd then keeps the activations and runs SwiGLU's backward as separate passes over memory. Here the
gradient of a stacked parameter is written once. Either a GEMM per expert writes into a slice of one buffer (smaller
blocks of rows were slower: oneDNN packs the weights at each call); or, in bf16 where there are AMX tiles, kernels of
our own (`amx_experts.inc`) pack weights once, take 128 rows at a time through both products, and have no set-up per
shape.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels import native
from moe_lm.kernels.combine import sum_rows
from moe_lm.kernels.gemm import gemm
from moe_lm.kernels.grouping import Grouping, groups

_aten = torch.ops.aten


def expert_mixture(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """See `experts.py`."""
    if torch.is_grad_enabled():
        return _with_gradients(x_TD, *grouping, gate_up_proj, down_proj)[0]
    return _forward(x_TD, grouping, gate_up_proj, down_proj, keeps=False)[0]


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
        for expert, rows in groups(end_E):
            x_pD = x_TD.index_select(0, token_P[rows])
            h_p2F = gemm(x_pD, gate_up_proj[expert].t(), out=h_P2F[rows])
            gemm(_swiglu(h_p2F, weight_P[rows]), down_proj[expert].t(), out=y_PD[rows])
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
    for expert, rows in groups(end_E, also_empty=True):
        if rows.start == rows.stop:
            for gradient in (gradients.gate_up, gradients.down):
                if gradient is not None:
                    gradient[expert].zero_()
            continue
        grad_y_pD = grad_y_TD.index_select(0, token_P[rows])
        grad_activation_pF = gemm(grad_y_pD, down_proj[expert])
        grad_weight_p = None if gradients.weight_P is None else gradients.weight_P[rows]
        activation_pF, grad_h_p2F = _swiglu_backward(h_P2F[rows], weight_P[rows], grad_activation_pF, grad_weight_p)
        if gradients.down is not None:
            gemm(grad_y_pD.t(), activation_pF, out=gradients.down[expert])
        if gradients.gate_up is not None:
            gemm(grad_h_p2F.t(), x_TD.index_select(0, token_P[rows]), out=gradients.gate_up[expert])
        if gradients.x_PD is not None:
            gemm(grad_h_p2F, gate_up_proj[expert], out=gradients.x_PD[rows])


def _take_tiles(x_TD: Tensor, grouping: Grouping, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
    sizes = *down_proj.shape[1:], *grouping.end_E.tolist()
    return native.takes_tiles(sizes, x_TD, grouping.weight_P, gate_up_proj, down_proj)


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
