"""Root-mean-square normalisation, exactly transformers' MixtralRMSNorm: fp32 inside, cast, then times the weight."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str | None = None) -> Tensor:
    """weight ⊙ x / sqrt(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019, equation 4)."""
    if backend in (None, "reference"):
        return _reference(x, weight, eps)
    raise ValueError(f"backend={backend!r}: choose reference or fused")


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
