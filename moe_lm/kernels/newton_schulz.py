"""Orthogonalisation of update matrices by a quintic Newton–Schulz iteration, as Muon needs it.

The coefficients are Muon's (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): they push singular values
into about [0.7, 1.2] in five steps instead of converging to 1, which trains as well and costs less. Stacked experts are
a batch: each matrix is normalised and orthogonalised by itself. The smaller side is squared, so the work is min(m,
n)²·max(m, n). bf16 where the hardware multiplies it, for the iteration corrects rounding as it goes; fp32 elsewhere.
"""

import torch
from torch import Tensor

from moe_lm.kernels import native
from moe_lm.kernels.hardware import has_fast_bf16

_LARGEST = 2**18
"""Values of a matrix that a thread iterates on by itself, on AMX tiles: with the packed form, the Gram matrix and the
polynomial at most 2.5 MB, which its cache holds."""

_SMALLEST_NORM = 1e-18

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def iteration_dtype(device: torch.device) -> torch.dtype:
    """The type that the iteration runs in."""
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def orthogonalize(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each matrix of the last two dimensions of `g`, roughly; zero stays zero.

    Args:
        g: [..., rows, columns]; leading dimensions are a batch.

    Returns:
        A tensor of g's shape, in bf16 where that is fast and in fp32 elsewhere.
    """
    assert g.ndim >= 2, g.shape
    a, b, c = COEFFICIENTS
    x = g.reshape(-1, *g.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # Norm in fp32, and a floor instead of an added epsilon: a tiny gradient is scaled as exactly as a large one, down
    # to where its squares begin to vanish. What is smaller stays small; one too large for its squares becomes 0.
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp_min(_SMALLEST_NORM)
    x = x.to(iteration_dtype(g.device)).contiguous()
    x = x * norms.reciprocal().to(x.dtype)  # rounding a factor of the whole matrix changes no direction
    if x.shape[1] * x.shape[2] <= _LARGEST and native.takes_tiles(x.shape[1:], x):
        native.run("amx_newton_schulz", None, x.numel() * x.shape[1], x, *x.shape, STEPS, a, b, c)
    else:
        for _ in range(STEPS):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(g.shape)
