"""Products of two matrices on a CPU: torch's, or in fp32 where processors have no AVX-512 our own (`fp32_gemm.inc`).

GFLOP/s on two cores of an EPYC with AVX2 (148 at most), MKL's and ours in turn: 1,024 rows through a weight
[1792, 256] 104 and 148, its gradients 119 and 135 (weight), 109 and 137 (rows); logits of 8,192 tokens 71 and 111;
projections 256×256 of 4,096 rows 79 and 127. With AVX-512 MKL's are as fast.
"""

import functools

import torch
from torch import Tensor

from moe_lm.kernels import native

_DEPTH, _PANEL = 512, 32
"""What is packed at a time: rows, and columns up to a multiple of at most this."""


def gemm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """The product a · b, into `out` where that is given, or added to what is there. No gradients."""
    if not is_native(a_MK, b_KN) or not (out is None or (is_native(out) and out.stride(1) == 1)):
        if out is None or not accumulate:
            return torch.mm(a_MK, b_KN, out=out)
        return out.addmm_(a_MK, b_KN)
    (M, K), N = a_MK.shape, b_KN.shape[1]
    out = a_MK.new_empty(M, N) if out is None else out
    packed = a_MK.new_empty(min(K, _DEPTH) * (N + _PANEL - 1))
    (a_row, a_step), (b_row, b_step) = a_MK.stride(), b_KN.stride()
    places = a_MK, a_row, a_step, b_KN, b_row, b_step, out, out.stride(0), packed
    native.run("fp32_gemm", None, M * N * K, *places, M, N, K, accumulate)
    return out


def is_native(*matrices: Tensor) -> bool:
    """Whether our own kernel takes these: not empty, and with rows or columns without gaps."""
    return (
        native.library() is not None
        and pays()
        and all(
            type(matrix) in (Tensor, torch.nn.Parameter)
            and matrix.dtype is torch.float32
            and matrix.device.type == "cpu"
            and matrix.numel() > 0
            and 1 in matrix.stride()
            for matrix in matrices
        )
    )


@functools.cache
def pays() -> bool:
    """Whether the kernel is faster than torch's on this processor."""
    asked = getattr(native.library(), "fp32_gemm_pays", None)
    return asked is not None and bool(asked())
