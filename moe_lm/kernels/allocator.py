"""Memory of tensors on CPUs: kept from step to step, and given back."""

import ctypes
import functools
import sys
from pathlib import Path

import torch

from moe_lm.kernels import compiled, native

SOURCE = Path(__file__).with_name("arena.cpp")


def keep_freed_memory() -> None:
    """Keep large freed blocks for those that follow, instead of returning them to the system.

    A training step frees and allocates the same large tensors every time; by default each one is unmapped and faulted
    in again, page by page (18,000–35,000 faults a step of the default model, 3–5 % of its time). Where there are native
    kernels, torch gets an allocator of our own (`arena.cpp`): the step of the reference model in fp32 holds 15 % less
    at its peak than with glibc's heap, and takes 5 % less time. Else glibc is told to keep them; no effect where the C
    library is another.
    """
    if (arena := _arena()) is not None and arena.arena_use():
        return
    library = _c_library()
    if library is None or not hasattr(library, "mallopt"):
        return
    trim_threshold, top_pad, mmap_threshold, largest = -1, -2, -3, 2**31 - 1  # names and signs from malloc.h
    # glibc before 2.35 refuses more than 32 MiB; where it refuses both, the other two settings would only freeze its
    # own, adaptive threshold at a low value.
    if library.mallopt(mmap_threshold, largest) or library.mallopt(mmap_threshold, 2**25):
        library.mallopt(trim_threshold, largest)
        library.mallopt(top_pad, 64 * 2**20)


def give_back_freed_memory() -> None:
    """Return the pages of freed blocks to the system: the opposite, for a process that will wait a while."""
    if (arena := _arena()) is not None:
        arena.arena_trim()
    library = _c_library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@functools.cache
def _arena() -> ctypes.CDLL | None:
    """The loaded allocator, which is compiled against this very torch's headers; null where there is none."""
    if native.library() is None:  # and if something is wrong with the compiler, that has been said
        return None
    torch_at = Path(torch.__file__).parent
    if not (torch_at / "include/c10/core/CPUAllocator.h").exists():  # some distributions leave headers out
        return None
    # The name is nobody's but the cache's: headers of another torch make another library.
    flags = ["-std=c++20", "-O2", "-fPIC", f"-I{torch_at / 'include'}", f'-DMADE_FOR="{torch.__version__}"']
    return compiled.load([SOURCE], flags, "glibc's allocator is used", [f"-L{torch_at / 'lib'}", "-lc10"])


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
