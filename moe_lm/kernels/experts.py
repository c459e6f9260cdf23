"""SwiGLU of all experts over rows grouped by expert: one interface, four backends.

Letters: R routed rows (grouped by expert, each group possibly padded with zero rows), D hidden, E experts, F
intermediate.

Why not one grouped GEMM everywhere: on a CPU `F.grouped_mm` loops inside, pays oneDNN's set-up for every new group size
(about 2 ms each), and autograd then keeps the activations and runs SwiGLU's backward as separate passes over memory.
The "cpu" backend is one operator: the gradient of a stacked parameter is written once, and the activation computed
again in the backward from the gate-up product, so that one [R, 2F] buffer per layer is kept instead of four. In it,
either a GEMM per expert into slices of one buffer (smaller blocks of rows were slower: oneDNN packs the weights at each
call); or, in bf16 where there are AMX tiles, kernels of our own (`amx_experts.inc`) that pack weights once, take 128
rows at a time through both products, and have no set-up per shape. Measured, 8192 rows, D 256, F 512, E 8, two AMX
cores, milliseconds forward and backward: reference 45, grouped 39, cpu 34 by oneDNN before the native SwiGLU, 27 with
it, 20 on tiles; fp32 98, 106–145, 87. A GPU takes "triton" (`triton/experts.py`): grouped products, with kernels of our
own between them; or "grouped" without Triton. Neither choice has been measured.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lm.kernels import native
from moe_lm.kernels.triton import launch

ROW_ALIGNMENT = 128
"""Largest multiple to which groups are rounded up; see `row_alignment`."""

_TILE = 32

_aten = torch.ops.aten


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


def expert_swiglu(
    x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor, backend: str | None = None
) -> Tensor:
    """Y = (silu(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ for every group of rows with its own expert's weights.

    Args:
        x_RD: rows grouped by expert, contiguous.
        group_ends_E: int32, the row at which each expert's group ends; rows at or past the last end give zeros.
        gate_up_proj: [E, 2F, D], gate first, in x's dtype.
        down_proj: [E, D, F], in x's dtype.
        backend: "reference", "grouped", "cpu", "triton", or None to choose by device and dtype.

    Returns:
        y_RD. Gradients of an expert without rows are exactly zero, never None.

    Raises:
        ValueError: on an unknown backend.
    """
    assert x_RD.dtype == gate_up_proj.dtype == down_proj.dtype, (x_RD.dtype, gate_up_proj.dtype, down_proj.dtype)
    assert group_ends_E.dtype == torch.int32, group_ends_E.dtype
    backend = backend or _default_backend(x_RD, gate_up_proj, down_proj)
    if backend == "reference":
        return _reference(x_RD, group_ends_E, gate_up_proj, down_proj)
    if backend == "grouped":
        return _grouped(x_RD, group_ends_E, gate_up_proj, down_proj)
    if backend == "cpu":
        if torch.is_grad_enabled():
            return _with_gradients(x_RD, group_ends_E, gate_up_proj, down_proj)[0]
        return _expert_loop(x_RD, group_ends_E, gate_up_proj, down_proj, keeps=False)[0]
    if backend == "triton":
        from moe_lm.kernels.triton import experts

        return experts.expert_swiglu(x_RD, group_ends_E, gate_up_proj, down_proj)
    raise ValueError(f"backend={backend!r}: choose reference, grouped, cpu or triton")


def _default_backend(x_RD: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> str:
    if launch.supports(x_RD, gate_up_proj, down_proj):
        return "triton"
    if x_RD.device.type == "cpu":
        return "cpu"
    return "reference" if x_RD.dtype == torch.float64 else "grouped"


def _reference(x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    parts, start = [], 0
    # unbind, not indexing: its backward stacks once, where indexing fills and adds a full-size zero tensor per expert.
    for end, gate_up, down in zip(group_ends_E.tolist(), gate_up_proj.unbind(0), down_proj.unbind(0), strict=True):
        gate, up = (x_RD[start:end] @ gate_up.t()).chunk(2, dim=-1)
        parts.append((F.silu(gate) * up) @ down.t())
        start = end
    parts.append(torch.zeros_like(x_RD[start:]))
    return torch.cat(parts)


def _grouped(x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    # Rows past the last end stay uninitialised in grouped_mm, forward and backward. Masking both input and output keeps
    # whatever lies there out of y and of the gradient of x, without asking the device where the end is.
    inside_R1 = (torch.arange(x_RD.shape[0], device=x_RD.device) < group_ends_E[-1]).unsqueeze(1)
    x_RD = torch.where(inside_R1, x_RD, 0)
    gate, up = F.grouped_mm(x_RD, gate_up_proj.transpose(1, 2), offs=group_ends_E).chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=group_ends_E)
    return torch.where(inside_R1, y_RD, 0)


def _expert_loop(
    x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor, keeps: bool = True
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward the gate-up product [R, 2F], in the tiles' order where they are taken."""
    if _take_tiles(x_RD, group_ends_E, gate_up_proj, down_proj):
        return _tiles_forward(x_RD, group_ends_E, gate_up_proj, down_proj, keeps)
    h_R2F = x_RD.new_empty(x_RD.shape[0], gate_up_proj.shape[1])
    y_RD = torch.empty_like(x_RD)
    start = 0
    for expert, end in enumerate(group_ends_E.tolist()):
        if end > start:
            h = torch.mm(x_RD[start:end], gate_up_proj[expert].t(), out=h_R2F[start:end])
            torch.mm(_swiglu(h), down_proj[expert].t(), out=y_RD[start:end])
        start = end
    y_RD[start:].zero_()
    return y_RD, h_R2F


# An operator of its own, not an autograd function: activation checkpointing can then keep its results as a whole.
@torch.library.custom_op("moe_lm::expert_loop", mutates_args=())
def _with_gradients(
    x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> tuple[Tensor, Tensor]:
    return _expert_loop(x_RD, group_ends_E, gate_up_proj, down_proj)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a gradient of zeros as large as the gate-up product is made for nothing
    ctx.save_for_backward(*inputs, output[1])
    ctx.in_tiles = _take_tiles(*inputs)


def _backward(ctx: Any, grad_y_RD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x_RD, group_ends_E, gate_up_proj, down_proj, h_R2F = ctx.saved_tensors
    needs_x, _, needs_gate_up, needs_down = ctx.needs_input_grad
    grad_y_RD = grad_y_RD.contiguous()
    grad_x_RD = torch.empty_like(x_RD) if needs_x else None
    grad_gate_up = torch.empty_like(gate_up_proj) if needs_gate_up else None
    grad_down = torch.empty_like(down_proj) if needs_down else None
    start = 0
    if ctx.in_tiles:
        kept = x_RD, group_ends_E, gate_up_proj, down_proj, h_R2F
        _tiles_backward(*kept, grad_y_RD, grad_x_RD, grad_gate_up, grad_down)
        return grad_x_RD, None, grad_gate_up, grad_down
    for expert, end in enumerate(group_ends_E.tolist()):
        rows, start = slice(start, end), end
        if rows.start == end:
            for gradient in (grad_gate_up, grad_down):
                if gradient is not None:
                    gradient[expert].zero_()
            continue
        activation, grad_h = _swiglu_backward(h_R2F[rows], torch.mm(grad_y_RD[rows], down_proj[expert]))
        if grad_down is not None:
            torch.mm(grad_y_RD[rows].t(), activation, out=grad_down[expert])
        if grad_gate_up is not None:
            torch.mm(grad_h.t(), x_RD[rows], out=grad_gate_up[expert])
        if grad_x_RD is not None:
            torch.mm(grad_h, gate_up_proj[expert], out=grad_x_RD[rows])
    if grad_x_RD is not None:
        grad_x_RD[start:].zero_()
    return grad_x_RD, None, grad_gate_up, grad_down


_with_gradients.register_autograd(_backward, setup_context=_keep_for_backward)


def _take_tiles(x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
    """Whether the kernels for matrix tiles take these: bf16, every size and every group's a multiple of 32."""
    sizes = *down_proj.shape[1:], *group_ends_E.tolist()
    return (
        x_RD.dtype is torch.bfloat16
        and all(size % _TILE == 0 for size in sizes)
        and native.supports(x_RD, gate_up_proj, down_proj)
        and native.has_amx()
    )


def _tiles_forward(
    x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor, keeps: bool
) -> tuple[Tensor, Tensor]:
    y_RD, packed = torch.empty_like(x_RD), x_RD.new_empty(gate_up_proj.numel() + down_proj.numel())
    h_R2F = x_RD.new_empty(x_RD.shape[0] if keeps else 0, gate_up_proj.shape[1])
    pointers = x_RD, group_ends_E.contiguous(), gate_up_proj, down_proj, packed, h_R2F if keeps else None, y_RD
    native.run("amx_experts", None, gate_up_proj.shape[1] * x_RD.numel(), *pointers, *down_proj.shape)
    y_RD[int(group_ends_E[-1]) :].zero_()
    return y_RD, h_R2F


def _tiles_backward(
    x_RD: Tensor,
    group_ends_E: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    h_R2F: Tensor,
    grad_y_RD: Tensor,
    grad_x_RD: Tensor | None,
    grad_gate_up: Tensor | None,
    grad_down: Tensor | None,
) -> None:
    """Writes those gradients that there are."""
    packed = x_RD.new_empty(gate_up_proj.numel() + down_proj.numel())
    activation = x_RD.new_empty(len(x_RD), down_proj.shape[2])
    x_transposed, grad_transposed = (torch.empty_like(x_RD) for _ in range(2))
    kept = x_RD, group_ends_E.contiguous(), gate_up_proj, down_proj, h_R2F, grad_y_RD
    room = packed, activation, torch.empty_like(h_R2F), x_transposed, grad_transposed
    gradients = grad_x_RD, grad_gate_up, grad_down
    native.run("amx_experts_backward", None, h_R2F.numel(), *kept, *room, *gradients, *down_proj.shape)
    if grad_x_RD is not None:
        grad_x_RD[int(group_ends_E[-1]) :].zero_()


def _swiglu(h_r2F: Tensor) -> Tensor:
    gate, up = h_r2F.chunk(2, dim=-1)
    if not native.supports(h_r2F):
        return F.silu(gate).mul_(up)
    activation_rF = torch.empty_like(gate, memory_format=torch.contiguous_format)
    native.run("swiglu", h_r2F.dtype, gate.numel(), h_r2F, activation_rF, *gate.shape)
    return activation_rF


def _swiglu_backward(h_r2F: Tensor, grad_activation_rF: Tensor) -> tuple[Tensor, Tensor]:
    """The activation again, and the gradient of [gate, up], one expert at a time so that the pieces stay in cache."""
    gate, up = h_r2F.chunk(2, dim=-1)
    grad_h_r2F = torch.empty_like(h_r2F)
    if native.supports(h_r2F, grad_activation_rF):
        pointers = h_r2F, grad_activation_rF, grad_h_r2F
        native.run("swiglu_backward", h_r2F.dtype, gate.numel(), *pointers, *gate.shape)
        return grad_activation_rF, grad_h_r2F
    grad_gate, grad_up = grad_h_r2F.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(grad_activation_rF, silu, out=grad_up)
    _aten.silu_backward.grad_input(grad_activation_rF.mul_(up), gate, grad_input=grad_gate)
    return silu.mul_(up), grad_h_r2F
