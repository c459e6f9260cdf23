"""How kernels are held to their fp64 reference: inputs, the comparison, and which implementations have run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.kernels.experts import expert_mixture
from moe_lm.kernels.grouping import Grouping

# bf16 keeps 8 bits: one rounding is 2⁻⁹ relative; a chain of three products stays well under 1 % in norm.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16]


def leaves(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def output_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    output = function(*inputs)
    gradients = torch.autograd.grad(output, inputs, upstream.to(output.dtype))
    return [output.detach(), *gradients]


def assert_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """Relative error in norm of every tensor; a zero reference must be met exactly."""
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    for index, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == reference.shape
        assert torch.isfinite(ours).all(), f"tensor {index} is not finite"
        error = (ours.double() - reference.double()).norm()
        assert error <= tolerance * reference.double().norm(), f"tensor {index}: {error}"


def assert_parity(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> None:
    """`function` in `dtype` against `reference` in fp64 on the very same (rounded) inputs."""
    inputs = leaves(*inputs, dtype=dtype)
    upstream = torch.randn_like(reference(*inputs))
    expected = output_and_gradients(reference, leaves(*inputs, dtype=torch.float64), upstream)
    actual = output_and_gradients(function, inputs, upstream)
    assert all(tensor.dtype == dtype for tensor in actual[1:])
    assert_close(actual, expected, dtype, tolerance)


def expert_inputs(counts: list[int], tail: int = 0, D: int = 16, F_: int = 24) -> tuple[list[Tensor], Tensor, Tensor]:
    """Tokens, rows' weights and experts' matrices; the token of each row, and where each expert's end.

    Tokens have two rows each, anywhere; those of rows past the last end have no others, and are the last ones.
    """
    E, rows, tokens = len(counts), sum(counts), (sum(counts) + 1) // 2
    token_P = torch.cat((torch.randperm(rows) // 2, torch.arange(tokens, tokens + tail)))
    matrices = [torch.randn(E, 2 * F_, D) / D**0.5, torch.randn(E, D, F_) / F_**0.5]
    inputs = [torch.randn(tokens + tail, D), torch.rand(rows + tail), *matrices]
    return inputs, token_P, torch.tensor(counts).cumsum(0).to(torch.int32)


def mixture(backend: str | None, token_P: Tensor, end_E: Tensor) -> Callable[..., Tensor]:
    return lambda x, weight, gate_up, down: expert_mixture(x, Grouping(token_P, weight, end_E), gate_up, down, backend)


def qkv(B: int, S: int, T: int, N: int, G: int, H: int) -> list[Tensor]:
    return [torch.randn(B, S, N, H), torch.randn(B, T, G, H), torch.randn(B, T, G, H)]


@dataclass(frozen=True)
class Kernels:
    """Which implementations a test runs with."""

    path: str
    """plain: torch alone; native: those in C++; amx: also those on Intel's matrix tiles."""
    calls: list[str]
    """Native functions called so far."""

    def assert_ran(self, native: set[str], amx: set[str] | None = None) -> None:
        """What ran is what should: nothing if plain, `native`, and with tiles `amx` in its place if given."""
        expected = {"plain": set(), "native": native, "amx": native if amx is None else amx}[self.path]
        assert set(self.calls) == expected
