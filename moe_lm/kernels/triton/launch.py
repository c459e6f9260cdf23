"""Whether the Triton kernels of this package take some tensors; on a CPU asking imports nothing.

The kernels replace what is memory traffic between a GPU's matrix products: torch makes several passes over rows where
one would do. Each file here holds one family, with the signature that its caller in `moe_lm/kernels` has in torch, and
imports triton; so callers import it where they have decided to use it, never at the top. Triton comes with torch's
builds for CUDA, and builds a small library at first use, for which it needs a C compiler and Python's headers; without
them, or with MOE_LM_TRITON=0, the plain versions take over.

All kernels have run through Triton's interpreter only (`tests/parity/test_triton_kernels.py`), which checks what they
compute and says nothing of speed: block sizes and numbers of warps are choices without measurement.
"""

import functools
import importlib.util
import subprocess
import warnings

import torch
from torch import Tensor

from moe_lm.kernels.hardware import is_switched_off

SWITCH = "MOE_LM_TRITON"
"""Environment variable; 0 turns the Triton kernels off."""
_TYPES = (torch.float32, torch.bfloat16)


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels are the choice for these tensors: plain ones on a GPU, of one type, contiguous, not empty."""
    return (
        tensors[0].is_cuda
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)  # a DTensor, say, has no memory of its own
        and all(t.is_cuda and t.dtype is tensors[0].dtype and t.is_contiguous() and t.numel() > 0 for t in tensors)
        and tensors[0].dtype in _TYPES
        and is_available()
    )


@functools.cache
def is_available() -> bool:
    """Whether Triton is wanted, installed and able to start a kernel; where it is not able, says why."""
    if is_switched_off(SWITCH) or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        return driver.active.get_current_target().backend == "cuda"
    except (RuntimeError, OSError, AssertionError, ImportError, subprocess.SubprocessError) as error:
        # The launcher is built by whatever compiler there is: none, or no headers, is not the end of a run.
        warnings.warn(f"no Triton kernels, plain ones are used ({SWITCH}=0 does without): {error}", stacklevel=2)
        return False


def block(size: int) -> int:
    """The power of two that a kernel takes at once to cover `size` values."""
    return 1 << max(size - 1, 0).bit_length()


def warps(block_size: int) -> int:
    """Warps of a program that goes through blocks of this size: 16 values to a thread, within 1 to 16 warps."""
    return min(max(block_size // 512, 1), 16)
