"""Parts of a step in C++ (`native.cpp`): compiled once for this machine at first use, then loaded.

What is left of a step on a CPU beside matrix products is memory traffic: torch makes two to eight passes where one
would do, and each has a thread start. And where there are AMX tiles, products themselves gain by what is fused around
them. GCC takes ten seconds, once. Without a compiler, or with MOE_LM_NATIVE=0, `supports` says no, and callers take
their plain version. A compiler whose OpenMP is not GCC's gives no library that loads, which is said.

The library needs nothing of torch but pointers, and it shares torch's OpenMP threads: two pools on the same cores would
wait for each other. A kernel that finds no memory for its scratch ends the process.
"""

import ctypes
import functools
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.kernels import compiled
from moe_lm.kernels.triton import launch

_HERE = Path(__file__).parent
SOURCES = [_HERE / "native.cpp", *sorted(_HERE.glob("*.inc"))]
"""The first includes the others."""

_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_ARGUMENTS = {
    "swiglu": "pppll",
    "swiglu_backward": "pppppll",
    "attention_softmax": "pplllllllf",
    "attention_softmax_backward": "ppll",
    "cross_entropy": "ppplli",
    "rms_norm": "ppppllf",
    "rms_norm_backward": "ppppppll",
    "rotary": "pppplllf",
    "sum_of_tokens": "ppplll",
    "sum_of_squares": "ppl",
    "adamw": "pppplffffffff",
    "nesterov": "ppplfff",
    "decay_and_add": "pplff",
    "mask_begins": "ppll",
    "decode": "ppppppppppf",
    "amx_attention": "pppppplllllf",
    "amx_attention_backward": "pppppppppplllllf",
    "fp32_gemm": "pllpllplpllli",
    "fp32_attention": "pppppplllllf",
    "fp32_attention_backward": "pppppppppplllllf",
    "amx_experts": "ppppppppplll",
    "amx_linear": "pppplll",
    "amx_linear_backward": "pppppppplll",
    "amx_cross_entropy": "ppppppppplll",
    "amx_newton_schulz": "pllllfff",
    "amx_experts_backward": "ppppppppppppppppplll",
}
"""Of each function, pointers, 64-bit numbers, floats and ints in their order; the number of threads comes last."""

TILE = 32
"""Multiple of rows, and of every size, that kernels for matrix tiles take."""

_VALUES_OF_A_THREAD = 8192
"""Values that one thread takes before others are worth their start."""


def supports(*tensors: Tensor | None) -> bool:
    """Whether the native kernels take these tensors: plain ones on a CPU, of one type that they have, contiguous."""
    present = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in present)  # a DTensor, say, has no memory of its own
        and all(t.device.type == "cpu" and t.dtype is present[0].dtype and t.is_contiguous() for t in present)
        and present[0].dtype in _TYPES
        and library() is not None
    )


@functools.cache
def has_amx() -> bool:
    """Whether the library has the kernels for Intel's matrix tiles, and may use them."""
    granted = getattr(library(), "amx_granted", None)
    return granted is not None and bool(granted())


def takes_tiles(sizes: Iterable[int], *tensors: Tensor) -> bool:
    """Whether the kernels for matrix tiles take these tensors: bf16, and every size a multiple of `TILE`."""
    return (
        tensors[0].dtype is torch.bfloat16
        and all(size % TILE == 0 for size in sizes)
        and supports(*tensors)
        and has_amx()
    )


def described(device: torch.device, dtype: torch.dtype) -> str:
    """What a reader of a run's log wants to know: which kernels it has on a CPU or a GPU. Empty on other devices."""
    if device.type == "cuda":
        return "Triton kernels" if launch.is_available() else "plain kernels"
    if device.type != "cpu":
        return ""
    if library() is None:
        return "plain kernels"
    return "native kernels on AMX tiles" if has_amx() and dtype is torch.bfloat16 else "native kernels"


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
    # All or one: OpenMP ends threads that a smaller team leaves out, and would start them again for the next operator.
    threads = torch.get_num_threads() if work >= 2 * _VALUES_OF_A_THREAD else 1
    function = _function(name, dtype)
    return function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), threads)


@functools.cache
def _function(name: str, dtype: torch.dtype | None) -> Callable[..., int]:
    function = getattr(library(), name if dtype is None else f"{name}_{_TYPES[dtype]}")
    function.argtypes = [*(_KINDS[kind] for kind in _ARGUMENTS[name]), ctypes.c_int]
    return function


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; null where it is switched off or can not be had, which is said once."""
    return compiled.load(SOURCES, _FLAGS, "no native kernels, plain ones are used")
