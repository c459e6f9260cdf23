"""What this machine can do at most, the yardstick of model-FLOPs utilisation, and what of it a run has used."""

import resource
import sys
import time
from pathlib import Path

import torch

from moe_lm import memory


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.3) -> float:
    """Best observed rate of a square matrix product, in FLOP/s; multiply-adds count as two."""
    if device.type == "cuda":
        size = 8192
    generator = torch.Generator(device).manual_seed(0)  # training leaves the global one alone
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    out = torch.empty_like(a)
    best = 0.0
    deadline = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    if device.type == "cuda":
        del a, b, out
        torch.cuda.empty_cache()  # 0.9 GB, which others may need
    return best


def total_memory(device: torch.device) -> int:
    """Memory of the GPU, or what this process may use of the machine's, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory.total_memory()


def peak_memory(device: torch.device) -> int:
    """Most memory that this process has held so far, in bytes: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # whose ru_maxrss begins with what the process that started this one had
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
