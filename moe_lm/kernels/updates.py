"""Update rules, element by element: one interface, a plain version and a native one on CPUs.

All of it is memory traffic. The native versions go over each number once, and take gradients in bf16 as backward made
them, clipped as they are read: a cast, a clipping and a norm of their own had cost as much as the update itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from moe_lm.kernels import native


def takes_low_gradients(device: torch.device) -> bool:
    """Whether the functions here read gradients in bf16 as fast as in fp32; else they are cast."""
    return device.type == "cpu" and native.library() is not None


def supports(gradient: Tensor, *state: Tensor) -> bool:
    """Whether the native rules take these: plain tensors on a CPU, the gradient fp32 or bf16, the rest fp32."""
    return native.supports(gradient) and native.supports(*state) and state[0].dtype is torch.float32


def squared_norms(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, fp64 [n]."""
    if not all(native.supports(gradient) for gradient in gradients):
        norms = torch._foreach_norm(list(gradients), dtype=torch.promote_types(gradients[0].dtype, torch.float32))
        return torch.stack(norms).double().square()
    squares_n = torch.empty(len(gradients), dtype=torch.float64)
    for gradient, square in zip(gradients, squares_n, strict=True):
        native.run("sum_of_squares", gradient.dtype, gradient.numel(), gradient, square, gradient.numel())
    return squares_n


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) in native code, for what it `supports`.

    Args:
        parameter: fp32, of any shape, changed in place.
        gradient: fp32 or bf16, taken times `scale`.
        mean: fp32, the gradient's running mean, changed in place.
        square: fp32, that of its square, changed in place.
        step: number of this step, from 1.
        lr: learning rate.
        betas: how much of the running means is kept.
        eps: added to the root of the second.
        weight_decay: times the learning rate, the part of the parameter that is taken away.
        scale: a number.
    """
    assert supports(gradient, parameter, mean, square), (gradient.dtype, parameter.dtype)
    corrections = [1 - beta**step for beta in betas]
    factors = scale, 1 - lr * weight_decay, lr / corrections[0]
    numbers = *factors, 1 - betas[0], betas[1], 1 - betas[1], corrections[1] ** -0.5, eps
    count = parameter.numel()
    native.run("adamw", gradient.dtype, count, parameter, gradient, mean, square, count, *numbers)
    increment_version((parameter, mean, square))  # as torch's own in-place operators do


def nesterov(gradient: Tensor, momentum: Tensor, beta: float, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Update a running mean, m ← β·m + (1 − β)·g, in place, and look ahead: β·m + (1 − β)·g once more.

    Args:
        gradient: fp32 or bf16, of any shape, taken times `scale`.
        momentum: fp32, of that shape.
        beta: β.
        dtype: that of the result.
        scale: a number.
    """
    if dtype is torch.bfloat16 and supports(gradient, momentum):
        ahead = torch.empty_like(momentum, dtype=dtype)
        count = gradient.numel()
        native.run("nesterov", gradient.dtype, count, gradient, momentum, ahead, count, beta, 1 - beta, scale)
        increment_version(momentum)
        return ahead
    gradient = gradient.to(momentum.dtype)
    if scale != 1:
        gradient = gradient * scale
    momentum.lerp_(gradient, 1 - beta)
    return gradient.lerp(momentum, beta).to(dtype)


def decay_and_add(parameter: Tensor, direction: Tensor, keep: float | Tensor, scale: float) -> None:
    """Parameter ← keep · parameter + scale · direction, in place.

    Args:
        parameter: fp32, of any shape.
        direction: of that shape and any type.
        keep: a number, or one for each matrix of a stack.
        scale: a number.
    """
    types = (parameter.dtype, direction.dtype) == (torch.float32, torch.bfloat16)
    if types and isinstance(keep, float) and native.supports(parameter):
        numbers = parameter.numel(), keep, scale
        native.run("decay_and_add", None, parameter.numel(), parameter, direction.contiguous(), *numbers)
        increment_version(parameter)
    else:
        parameter.mul_(keep).add_(direction, alpha=scale)
