"""Copies from the host to a device that wait for nothing."""

import torch
from torch import Tensor


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device; to a GPU by way of pinned memory, for the driver may wait for what is pageable."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # torch pins with the same strides, and refuses those of an expanded tensor.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
