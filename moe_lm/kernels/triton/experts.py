"""The mixture of experts: torch's grouped matrix products, and one pass over memory for what is between them.

Letters: T tokens, P rows grouped by expert, D hidden, E experts, F intermediate.

The products stay torch's `F.grouped_mm` (CUTLASS, with Hopper's matrix instructions and TMA; it never asks the device
how large a group is). A grouped product in Triton could take in the gather of token rows and the SwiGLU, and would save
two passes over [P, D] and one over [P, 2F]; but at F 7168 these are a few percent of the products' time, and
Triton's products on Hopper stay further than that behind CUTLASS's. Not measured.

As in the CPU's backend, what is kept of a layer is the gate-up product and the tokens: rows are gathered again in the
backward, and the activation is computed again, over its own gradient, read in the same place.

Rows past the last group's end are uninitialised behind grouped products. Nothing reads them; what is summed per token
is zeroed there, starting at an end that only the device knows. So are gradients of experts without rows, which CUTLASS
leaves out on Blackwell (pytorch issue 172439).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_lm.kernels.triton import rows

_BLOCK = 1024
_PROGRAMS = 528


def expert_mixture(
    x_TD: Tensor, token_P: Tensor, weight_P: Tensor, end_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """See `moe_lm/kernels/experts.py`; contiguous, of one type, and not empty."""
    y_TD: Tensor = _Mixture.apply(x_TD, token_P, weight_P, end_E, gate_up_proj, down_proj)
    return y_TD


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_P, weight_P, end_E, gate_up_proj, down_proj):
        h_P2F = F.grouped_mm(x_TD.index_select(0, token_P), gate_up_proj.mT, offs=end_E)
        y_PD = F.grouped_mm(swiglu(h_P2F, weight_P, end_E), down_proj.mT, offs=end_E)
        order = rows.order(token_P, len(x_TD))
        ctx.save_for_backward(x_TD, token_P, weight_P, end_E, gate_up_proj, down_proj, h_P2F, *order)
        return rows.sum_rows(zero_past_the_end(y_PD, end_E), order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y_TD):
        x_TD, token_P, weight_P, end_E, gate_up_proj, down_proj, h_P2F, *order = ctx.saved_tensors
        needs_x, _, _, _, needs_gate_up, needs_down = ctx.needs_input_grad
        grad_y_PD = grad_y_TD.index_select(0, token_P)
        grad_activation_PF = F.grouped_mm(grad_y_PD, down_proj, offs=end_E)
        activation_PF, grad_h_P2F, grad_weight_P = swiglu_backward(h_P2F, weight_P, grad_activation_PF, end_E)
        grad_x, grad_gate_up, grad_down = None, None, None
        if needs_down:
            grad_down = F.grouped_mm(grad_y_PD.t(), activation_PF, offs=end_E)
            zero_empty_groups(grad_down, end_E)
        if needs_gate_up:
            grad_gate_up = F.grouped_mm(grad_h_P2F.t(), x_TD.index_select(0, token_P), offs=end_E)
            zero_empty_groups(grad_gate_up, end_E)
        if needs_x:
            grad_x_PD = F.grouped_mm(grad_h_P2F, gate_up_proj, offs=end_E)
            grad_x = rows.sum_rows(zero_past_the_end(grad_x_PD, end_E), rows.Order(*order))
        return grad_x, None, grad_weight_P, None, grad_gate_up, grad_down


def swiglu(h_P2F: Tensor, weight_P: Tensor, end_E: Tensor) -> Tensor:
    """Rows' weight · silu(gate) ⊙ up, of rows [gate, up]; those past the last end are left uninitialised."""
    P, F_ = h_P2F.shape[0], h_P2F.shape[1] // 2
    activation_PF = h_P2F.new_empty(P, F_)
    grid = P, triton.cdiv(F_, _BLOCK)
    _swiglu[grid](h_P2F, weight_P, activation_PF, end_E, len(end_E), F_, BLOCK=_BLOCK)
    return activation_PF


def swiglu_backward(
    h_P2F: Tensor, weight_P: Tensor, grad_activation_PF: Tensor, end_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The activation again, in the place of its gradient, and the gradients of [gate, up] and of weights; rows as in
    `swiglu`, the weights of those past the last end have none.
    """
    P, F_ = grad_activation_PF.shape
    grad_h_P2F, grad_weight_P = torch.empty_like(h_P2F), torch.empty_like(weight_P)
    pointers = h_P2F, weight_P, grad_activation_PF, grad_h_P2F, grad_weight_P, end_E
    _swiglu_backward[(P,)](*pointers, len(end_E), F_, BLOCK=_BLOCK)
    return grad_activation_PF, grad_h_P2F, grad_weight_P


def zero_past_the_end(y_RD: Tensor, group_ends_E: Tensor) -> Tensor:
    """Set rows past the last group's end to zero, in place."""
    R, D = y_RD.shape
    _zero_past_the_end[min(R, _PROGRAMS),](y_RD, group_ends_E, len(group_ends_E), y_RD.numel(), D, BLOCK=_BLOCK)
    return y_RD


def zero_empty_groups(weight_EIO: Tensor, group_ends_E: Tensor) -> None:
    """Set the matrices of experts without rows to zero, in place."""
    E, size = len(weight_EIO), weight_EIO[0].numel()
    assert weight_EIO.is_contiguous()
    programs = min(triton.cdiv(size, _BLOCK), _PROGRAMS)
    _zero_empty_groups[E, programs](weight_EIO, group_ends_E, size, BLOCK=_BLOCK)


@triton.jit
def _swiglu(h_ptr, weight_ptr, activation_ptr, ends_ptr, E, F_, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < F_) & (row < tl.load(ends_ptr + E - 1))
    gate = tl.load(h_ptr + row * 2 * F_ + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * F_ + F_ + column, mask=inside, other=0.0).to(tl.float32)
    activation = gate * tl.sigmoid(gate) * up * tl.load(weight_ptr + row).to(tl.float32)
    tl.store(activation_ptr + row * F_ + column, activation.to(activation_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    h_ptr, weight_ptr, activation_ptr, grad_h_ptr, grad_weight_ptr, ends_ptr, E, F_, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    weight, width = tl.load(weight_ptr + row).to(tl.float32), tl.where(row < tl.load(ends_ptr + E - 1), F_, 0)
    of_weight = tl.zeros([BLOCK], tl.float32)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        of_gate, of_up, of_activation = row * 2 * F_ + column, row * 2 * F_ + F_ + column, row * F_ + column
        gate = tl.load(h_ptr + of_gate, mask=column < F_, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + of_up, mask=column < F_, other=0.0).to(tl.float32)
        gradient = tl.load(activation_ptr + of_activation, mask=column < F_, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        of_weight += gradient * silu * up
        gradient *= weight
        of_silu = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(activation_ptr + of_activation, (silu * up * weight).to(dtype), mask=column < F_)
        tl.store(grad_h_ptr + of_gate, of_silu.to(dtype), mask=column < F_)
        tl.store(grad_h_ptr + of_up, (gradient * silu).to(dtype), mask=column < F_)
    tl.store(grad_weight_ptr + row, tl.sum(of_weight, axis=0).to(dtype))


@triton.jit
def _zero_past_the_end(y_ptr, ends_ptr, E, size, D, BLOCK: tl.constexpr):
    begin = tl.load(ends_ptr + E - 1).to(tl.int64) * D
    for first in range(begin, size, tl.num_programs(0) * BLOCK):
        place = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + place, tl.zeros([BLOCK], y_ptr.dtype.element_ty), mask=place < size)


@triton.jit
def _zero_empty_groups(weight_ptr, ends_ptr, size, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    if tl.load(ends_ptr + expert) == begin:
        for first in range(0, size, tl.num_programs(1) * BLOCK):
            place = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], weight_ptr.dtype.element_ty)
            tl.store(weight_ptr + expert.to(tl.int64) * size + place, zero, mask=place < size)
