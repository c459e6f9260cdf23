"""Products of two matrices on a CPU: torch's, or in fp32 where processors have no AVX-512 our own (`fp32_gemm.inc`).

GFLOP/s on two cores of an EPYC with AVX2 (148 at most), MKL's and ours in turn: 1,024 rows through a weight
[1792, 256] 104 and 148, its gradients 119 and 135 (weight), 109 and 137 (rows); logits of 8,192 tokens 71 and 111;
projections 256×256 of 4,096 rows 79 and 127. With AVX-512, MKL's are taken: ours were not measured there.
"""

import torch
from torch import Tensor

from moe_lm.kernels import native

_DEPTH, _COLUMNS, _PANEL = 512, 4096, 32
"""What is packed at a time: rows and columns, these up to a multiple of at most the last."""

_FEWEST_ROWS = 128
"""The right factor is packed for each product, which has to pay. At 128 rows ours are 0.8 to 1.0 times as fast where
products are small (256 columns), and 1.2 to 1.5 times where they are logits."""


def gemm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """The product a · b, into `out` where that is given, or added to what is there.

    Args:
        a_MK: left factor.
        b_KN: right factor.
        out: [M, N], apart from both factors in memory.
        accumulate: add to `out` instead of writing over it.
    """
    # Where autograd is to follow, in second derivatives, it has to see the product.
    followed = torch.is_grad_enabled() and (a_MK.requires_grad or b_KN.requires_grad)
    written = out is None or (_has_form(out) and out.stride(1) == 1)
    if followed or not written or not takes(a_MK, b_KN):
        if out is None or not accumulate:
            return torch.mm(a_MK, b_KN, out=out)
        return out.addmm_(a_MK, b_KN)
    (M, K), N = a_MK.shape, b_KN.shape[1]
    out = a_MK.new_empty(M, N) if out is None else out
    assert out.shape == (M, N) and (M == 1 or out.stride(0) >= N), (out.shape, out.stride(), M, N)
    packed = a_MK.new_empty(min(K, _DEPTH) * (min(N, _COLUMNS) + _PANEL - 1))
    (a_row, a_step), (b_row, b_step) = a_MK.stride(), b_KN.stride()
    places = a_MK, a_row, a_step, b_KN, b_row, b_step, out, out.stride(0), packed
    native.run("fp32_gemm", None, M * N * K, *places, M, N, K, accumulate)
    return out


def takes(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether our own kernel multiplies these, and is the faster one."""
    fit = a_MK.dim() == b_KN.dim() == 2 and a_MK.shape[1] == b_KN.shape[0] and len(a_MK) >= _FEWEST_ROWS
    return fit and _has_form(a_MK) and _has_form(b_KN) and pays()  # a library is made only where it is wanted


def _has_form(matrix: Tensor) -> bool:
    """Whether this is what the kernel reads: in fp32, not empty, rows or columns without gaps."""
    return (
        type(matrix) in (Tensor, torch.nn.Parameter)
        and matrix.dtype is torch.float32
        and matrix.device.type == "cpu"
        and matrix.numel() > 0
        and 1 in matrix.stride()
    )


def pays() -> bool:
    """Whether the kernel is faster than torch's on this processor."""
    library = native.library()
    return library is not None and bool(library.fp32_gemm_pays())
