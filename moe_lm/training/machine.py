"""What this machine can do at most: the yardstick of model-FLOPs utilisation."""

import time

import torch


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.3) -> float:
    """Best observed rate of a square matrix product, in FLOP/s; multiply-adds count as two."""
    if device.type == "cuda":
        size = 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    best = 0.0
    deadline = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
