"""Rotary position embedding, half rotation as in transformers' Mixtral: the plain version, a native one on CPUs, and
one in Triton on GPUs.

Three versions in torch alone were measured in bf16 (addcmul on halves, rotation as a matrix product, roll): from 1.4×
faster with head_dim 64 to 1.5× slower with 32, where halves are too short to vectorise.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lm.kernels import native
from moe_lm.kernels.triton import launch


def apply_rotary(x_BSNH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor, backend: str | None = None) -> Tensor:
    """x·cos + rotate_half(x)·sin, the same angles for every head (Su et al. 2021, equation 34, in half layout).

    Args:
        x_BSNH: queries or keys.
        cos_BSH: cosines; both halves of H are the same.
        sin_BSH: sines, likewise.
        backend: "reference", "native" (CPU; all of one type, contiguous, with a compiler), "triton" (GPU; likewise), or
            None to choose.

    Raises:
        ValueError: on an unknown backend.
    """
    angles = (*x_BSNH.shape[:2], x_BSNH.shape[3])  # one batch row of them for all would be read beyond its end
    assert cos_BSH.shape == sin_BSH.shape == angles, (cos_BSH.shape, sin_BSH.shape, angles)
    if backend is None:
        backend = "native" if native.supports(x_BSNH, cos_BSH, sin_BSH) else "reference"
        if launch.supports(x_BSNH, cos_BSH, sin_BSH):
            backend = "triton"
    if backend == "reference":
        first, second = x_BSNH.chunk(2, dim=-1)
        return x_BSNH * cos_BSH.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin_BSH.unsqueeze(2)
    if backend == "native":
        if not torch.is_grad_enabled():
            return _rotated(x_BSNH, cos_BSH, sin_BSH, 1.0)
        y_BSNH: Tensor = _Rotation.apply(x_BSNH, cos_BSH, sin_BSH)
        return y_BSNH
    if backend == "triton":
        from moe_lm.kernels.triton import rotary

        return rotary.apply_rotary(x_BSNH, cos_BSH, sin_BSH)
    raise ValueError(f"backend={backend!r}: choose reference, native or triton")


def _rotated(x_BSNH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor, sign: float) -> Tensor:
    y_BSNH = torch.empty_like(x_BSNH)
    B, S, N, H = x_BSNH.shape
    native.run("rotary", x_BSNH.dtype, x_BSNH.numel(), x_BSNH, cos_BSH, sin_BSH, y_BSNH, B * S, N, H, sign)
    return y_BSNH


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSNH, cos_BSH, sin_BSH):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos_BSH, sin_BSH)
        return _rotated(x_BSNH, cos_BSH, sin_BSH, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSNH):  # type: ignore[no-untyped-def]
        cos_BSH, sin_BSH = ctx.saved_tensors
        return _rotated(grad_BSNH.contiguous(), cos_BSH, sin_BSH, -1.0), None, None
