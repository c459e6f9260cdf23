"""Processes: who we are, where we compute, and the few collectives that replicated training needs.

Accelerate owns launch, process group, device and trackers; `torchrun`, `accelerate launch` and plain `python -m` all
end here. It does not wrap the model: experts that are sharded over processes need meshes of their own, which it does
not know.
"""

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from moe_lm.errors import InputError


class Runtime:
    """This process among its peers."""

    def __init__(self, device: str = "auto", tracker: str | None = None):
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("trainer.device=cuda: no CUDA device is visible here; use trainer.device=auto or cpu.")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if on_cpu:
            keep_freed_memory()
        # Said outright, because Accelerate guesses otherwise: under torchrun on a CPU every rank takes itself for the
        # main one. Its own mixed precision stays off, whatever the launcher's environment says.
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", log_with=tracker)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place. Every process gives the same shapes in the same
        order.

        Sums, never means: losses are divided by the global token count before backward, and gloo's AVG has summed
        silently.
        """
        if self.world_size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def launched_rank() -> int:
    """Rank that the launcher gave this process; known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of processes that the launcher started; known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of returning them to the system.

    A training step frees and allocates the same large tensors every time; by default each one is unmapped and faulted
    in again, page by page, which took a quarter of a step here. No effect where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6")
    if not hasattr(library, "mallopt"):
        return
    trim_threshold, top_pad, mmap_threshold, largest = -1, -2, -3, 2**31 - 1  # names and signs from malloc.h
    library.mallopt(mmap_threshold, largest)
    library.mallopt(trim_threshold, largest)
    library.mallopt(top_pad, 64 * 2**20)
