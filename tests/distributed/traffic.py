"""Counts what a process puts on the wire, by watching every collective that torch.distributed is asked for."""

import dataclasses
from collections import Counter
from fractions import Fraction

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.parallel.cost import Traffic


class CountTraffic(TorchDispatchMode):
    """Bytes that this process sends to others while the context is open, as `parallel/cost.py` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind, sent = _sent(function._schema.name.removeprefix("c10d::"), args)
            self.traffic += Traffic(**{kind: Fraction(sent)})
            self.calls[kind] += 1
        return function(*args, **(kwargs or {}))

    def said(self) -> dict[str, str]:
        return said(self.traffic)


def said(traffic: Traffic) -> dict[str, str]:
    return {kind: str(sent) for kind, sent in dataclasses.asdict(traffic).items()}


def _sent(name: str, args) -> tuple[str, int | Fraction]:
    """Kind and bytes of one collective; one that is not known is an error, for it would go uncounted."""
    group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    group = dist.ProcessGroup.unbox(group)
    others = group.size() - 1
    match name:
        case "_allgather_base_":
            return "all_gather", others * args[1].nbytes
        case "allgather_":
            return "all_gather", others * args[1][0].nbytes
        case "_reduce_scatter_base_":
            return "reduce_scatter", others * args[0].nbytes
        case "allreduce_":
            return "all_reduce", Fraction(2 * others * sum(tensor.nbytes for tensor in args[0]), group.size())
        case "alltoall_base_":
            given, splits = args[1], args[4]
            row = given.nbytes // given.shape[0] if given.shape[0] else 0
            return "all_to_all", (given.shape[0] - splits[group.rank()]) * row
    raise NotImplementedError(f"c10d::{name}")
