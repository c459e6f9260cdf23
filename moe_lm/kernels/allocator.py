"""The C library's allocator on CPUs."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of returning them to the system.

    A training step frees and allocates the same large tensors every time; by default each one is unmapped and faulted
    in again, page by page (18,000–35,000 faults a step of the default model, 3–5 % of its time). No effect where the C
    library is another.
    """
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
    library = _c_library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
