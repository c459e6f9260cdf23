"""Copies to a device, on a machine without one: pinning is torch's own recipe, in memory that is not pinned."""

import pytest
import torch
from torch import Tensor

from moe_lm.transfer import copied_to


def pinned(tensor: Tensor) -> Tensor:
    """What torch's `pin_memory` does: a storage as long as the strides ask for, and the numbers copied into it."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    storage = torch.UntypedStorage(length * tensor.element_size())
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("kind", ["whole", "a part", "transposed", "expanded"])
def test_tensors_of_any_strides_are_pinned(kind, monkeypatch):
    """Catches positions that are the same for every row, as of `expand`, which torch can not pin as they are."""
    tensor = {
        "whole": torch.arange(12).view(3, 4),
        "a part": torch.arange(12).view(3, 4)[1:, ::2],
        "transposed": torch.arange(12).view(3, 4).t(),
        "expanded": torch.arange(4).expand(3, -1),
    }[kind]
    sent = []

    def to(self: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        assert device.type == "cuda" and non_blocking
        sent.append(self)
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", to)
    copied = copied_to(tensor, torch.device("cuda"))
    assert torch.equal(copied, tensor) and copied.data_ptr() != tensor.data_ptr() and len(sent) == 1
