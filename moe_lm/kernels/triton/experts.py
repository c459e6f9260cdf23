"""SwiGLU of all experts: torch's grouped matrix products, and one pass over memory for what is between them.

Letters: R rows grouped by expert, D hidden, E experts, F intermediate.

The products stay torch's `F.grouped_mm` (CUTLASS, with Hopper's matrix instructions and TMA; it never asks the device
how large a group is). A grouped product in Triton could take in the gather of token rows and the SwiGLU, and would save
two passes over [R, D] and one over [R, 2F]; but at F 7168 these are a few percent of the products' time, and
Triton's products on Hopper stay further than that behind CUTLASS's. Not measured.

As in the CPU's backend, the activation is computed again in the backward from the gate-up product: one [R, 2F] buffer
per layer is kept instead of three. It overwrites its own gradient, read in the same place.

Rows past the last group's end are uninitialised behind grouped products. Nothing reads them; what leaves this file is
zeroed there, starting at an end that only the device knows. So are gradients of experts without rows, which CUTLASS
leaves out on Blackwell (pytorch issue 172439).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 1024
_PROGRAMS = 528


def expert_swiglu(x_RD: Tensor, group_ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """See `moe_lm/kernels/experts.py`; contiguous, of one type, and not empty."""
    y_RD: Tensor = _GroupedSwiGLU.apply(x_RD, group_ends_E, gate_up_proj, down_proj)
    return y_RD


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, group_ends_E, gate_up_proj, down_proj):
        h_R2F = F.grouped_mm(x_RD, gate_up_proj.mT, offs=group_ends_E)
        y_RD = F.grouped_mm(swiglu(h_R2F, group_ends_E), down_proj.mT, offs=group_ends_E)
        ctx.save_for_backward(x_RD, group_ends_E, gate_up_proj, down_proj, h_R2F)
        return zero_past_the_end(y_RD, group_ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y_RD):
        x_RD, group_ends_E, gate_up_proj, down_proj, h_R2F = ctx.saved_tensors
        needs_x, _, needs_gate_up, needs_down = ctx.needs_input_grad
        grad_y_RD = grad_y_RD.contiguous()
        grad_activation_RF = F.grouped_mm(grad_y_RD, down_proj, offs=group_ends_E)
        activation_RF, grad_h_R2F = swiglu_backward(h_R2F, grad_activation_RF, group_ends_E)
        grad_x, grad_gate_up, grad_down = None, None, None
        if needs_down:
            grad_down = F.grouped_mm(grad_y_RD.t(), activation_RF, offs=group_ends_E)
            zero_empty_groups(grad_down, group_ends_E)
        if needs_gate_up:
            grad_gate_up = F.grouped_mm(grad_h_R2F.t(), x_RD, offs=group_ends_E)
            zero_empty_groups(grad_gate_up, group_ends_E)
        if needs_x:
            grad_x = zero_past_the_end(F.grouped_mm(grad_h_R2F, gate_up_proj, offs=group_ends_E), group_ends_E)
        return grad_x, None, grad_gate_up, grad_down


def swiglu(h_R2F: Tensor, group_ends_E: Tensor) -> Tensor:
    """silu(gate) ⊙ up of rows [gate, up]; rows past the last end are left uninitialised."""
    R, F_ = h_R2F.shape[0], h_R2F.shape[1] // 2
    activation_RF = h_R2F.new_empty(R, F_)
    grid = R, triton.cdiv(F_, _BLOCK)
    _swiglu[grid](h_R2F, activation_RF, group_ends_E, len(group_ends_E), F_, BLOCK=_BLOCK)
    return activation_RF


def swiglu_backward(h_R2F: Tensor, grad_activation_RF: Tensor, group_ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """The activation again, in the place of its gradient, and the gradient of [gate, up]; rows as in `swiglu`."""
    R, F_ = grad_activation_RF.shape
    grad_h_R2F = torch.empty_like(h_R2F)
    pointers = h_R2F, grad_activation_RF, grad_h_R2F, group_ends_E
    _swiglu_backward[R, triton.cdiv(F_, _BLOCK)](*pointers, len(group_ends_E), F_, BLOCK=_BLOCK)
    return grad_activation_RF, grad_h_R2F


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
def _swiglu(h_ptr, activation_ptr, ends_ptr, E, F_, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < F_) & (row < tl.load(ends_ptr + E - 1))
    gate = tl.load(h_ptr + row * 2 * F_ + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * F_ + F_ + column, mask=inside, other=0.0).to(tl.float32)
    activation = gate * tl.sigmoid(gate) * up
    tl.store(activation_ptr + row * F_ + column, activation.to(activation_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(h_ptr, activation_ptr, grad_h_ptr, ends_ptr, E, F_, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < F_) & (row < tl.load(ends_ptr + E - 1))
    of_gate, of_up, of_activation = row * 2 * F_ + column, row * 2 * F_ + F_ + column, row * F_ + column
    gate = tl.load(h_ptr + of_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + of_up, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(activation_ptr + of_activation, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    tl.store(activation_ptr + of_activation, (silu * up).to(dtype), mask=inside)
    tl.store(grad_h_ptr + of_gate, (gradient * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=inside)
    tl.store(grad_h_ptr + of_up, (gradient * silu).to(dtype), mask=inside)


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
