"""Row-wise pieces of a step in C++ (`native.cpp`): compiled once for this machine at first use, then loaded.

What is left of a step on a CPU beside matrix products is memory traffic: torch makes two to eight passes where one
would do, and each has a thread start. The compiler takes 1.2 s once; the library is kept in the user's cache. Without a
compiler, or with MOE_LM_NATIVE=0, `supports` says no, and callers take their plain version.

The library needs nothing of torch but pointers, and it shares torch's OpenMP threads: two pools on the same cores would
wait for each other.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.files import write_atomically

SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "amx.inc")]
"""The first includes the second."""
SWITCH = "MOE_LM_NATIVE"
"""Environment variable; 0 turns the native kernels off."""

_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_ARGUMENTS = {
    "swiglu": "ppll",
    "swiglu_backward": "pppll",
    "attention_softmax": "pplllllllf",
    "attention_softmax_backward": "ppll",
    "cross_entropy": "ppplli",
    "rms_norm": "ppppllf",
    "rms_norm_backward": "ppppppll",
    "rotary": "pppplllf",
    "mask_begins": "ppll",
    "amx_attention": "pppppplllllf",
    "amx_attention_backward": "pppppppppplllllf",
    "amx_experts": "ppppppplll",
    "amx_experts_backward": "pppppppppppppplll",
}
"""Of each function, pointers, 64-bit numbers, floats and ints in their order; the number of threads comes last."""

_ROWS_OF_A_THREAD = 8192
"""Values that one thread takes before a second is worth its start."""


def supports(*tensors: Tensor | None) -> bool:
    """Whether the native kernels take these tensors: on a CPU, of one type that they have, contiguous."""
    present = [tensor for tensor in tensors if tensor is not None]
    return (
        all(t.device.type == "cpu" and t.dtype is present[0].dtype and t.is_contiguous() for t in present)
        and present[0].dtype in _TYPES
        and library() is not None
    )


@functools.cache
def has_amx() -> bool:
    """Whether the library has the kernels for Intel's matrix tiles, and may use them."""
    return hasattr(library(), "amx_granted") and bool(library().amx_granted())


def run(name: str, dtype: torch.dtype | None, work: int, *arguments: Tensor | int | float | None) -> int:
    """Call a function of `native.cpp` for a type.

    Args:
        name: the function.
        dtype: its T; null for a function of one type.
        work: number of values that it goes through, by which threads are started.
        arguments: those of the function in their order, but the last, the number of threads. Tensors must be
            contiguous, of the type that the function names; null is a null pointer.

    Returns:
        What the function does, if anything.
    """
    threads = max(1, min(torch.get_num_threads(), work // _ROWS_OF_A_THREAD))
    function = _function(name, dtype)
    return function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), threads)


@functools.cache
def _function(name: str, dtype: torch.dtype | None) -> "ctypes._CFuncPtr":
    function: ctypes._CFuncPtr = getattr(library(), name if dtype is None else f"{name}_{_TYPES[dtype]}")
    function.argtypes = [*(_KINDS[kind] for kind in _ARGUMENTS[name]), ctypes.c_int]
    return function


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; null where it is switched off or can not be had, which is said once."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if os.environ.get(SWITCH) == "0" or compiler is None or sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"no native kernels, plain ones are used ({SWITCH}=0 says so without trying): {detail}", stacklevel=2)
        return None


def _compiled(compiler: str) -> Path:
    """The library for this source, compiler and processor, compiled if the user's cache has none."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    made_of = "\n".join((*(source.read_text() for source in SOURCES), version, *_FLAGS, processor, platform.machine()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-lm"
    path = cache / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as directory:
            built, objects = Path(directory) / "native.so", Path(directory) / "native.o"
            for command in (["-c", str(SOURCES[0]), "-o", str(objects), *_FLAGS], ["-shared", str(objects), "-o", str(built)]):
                # -fopenmp is left out of the link: the names are then found in the library that torch has loaded.
                subprocess.run([compiler, *command], capture_output=True, check=True, text=True, timeout=120)
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(path, built.read_bytes())  # other processes may be doing the same
    return path
