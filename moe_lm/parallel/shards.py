"""This process's part of each parameter, as plain tensors, and where it lies in the whole.

FSDP2 keeps parameters as DTensors. Optimizer, guards and checkpoints need three things of them: the numbers that are
here, which numbers of the whole model they are, and which process counts those that several hold. So they all work on
`ParameterShard`s, in a single process and in a thousand, and nothing else knows of DTensors.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclasses.dataclass(frozen=True)
class Box:
    """A box of a whole parameter, and where it lies in this process's part."""

    offsets: list[int]
    """Its first corner in the whole parameter."""
    lengths: list[int]
    row: int
    """Its first row (of dimension 0) here."""

    def of(self, local: Tensor) -> Tensor:
        """The box of this process's part, a view."""
        return local.narrow(0, self.row, self.lengths[0]) if self.lengths else local


@dataclasses.dataclass(frozen=True)
class ParameterShard:
    """This process's part of one parameter."""

    name: str
    shape: list[int]
    """Of the whole parameter."""
    parameter: nn.Parameter
    """As backward finds it; a DTensor where it is sharded."""
    boxes: list[Box]
    """What of the whole parameter is here; none where the parameter has fewer rows than processes."""
    counts: bool = True
    """Whether these numbers count in sums over all processes; false where another replica's do."""
    group: dist.ProcessGroup | None = None
    """The processes that share each of its matrices; null where this one has whole matrices."""
    dim: int = 0
    """The dimension that it is cut along."""
    extent: int = 0
    """Size of that dimension over the whole group."""
    trained: Tensor | None = None
    """Which rows of dimension 0 here are trained, bool [rows, 1 …]; null means all, or that `parameter` needs no
    gradient at all."""

    @property
    def value(self) -> Tensor:
        """The numbers that are here; changing them in place changes the parameter."""
        return _local(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """Their gradient; null before backward."""
        return None if self.parameter.grad is None else _local(self.parameter.grad)

    def training_only(self, experts: Sequence[int]) -> "ParameterShard":
        """The same shard of stacked experts, of which these numbers alone are trained."""
        trained = torch.zeros(self.value.shape[0], dtype=torch.bool, device=self.value.device)
        for box in self.boxes:
            first, length = box.offsets[0], box.lengths[0]
            trained[box.row : box.row + length] = torch.tensor([n in experts for n in range(first, first + length)])
        return dataclasses.replace(self, trained=trained.view(-1, *[1] * (self.value.dim() - 1)))

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Take this process's part of the whole parameter."""
        for box in self.boxes:
            part = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths))]
            box.of(self.value).copy_(part)

    def gather(self, local: Tensor) -> Tensor:
        """Whole matrices, those of which this process has a part, from every process's `local`; all must call it."""
        if self.group is None:
            return local
        size = dist.get_world_size(self.group)
        chunk = -(-self.extent // size)
        shape = list(local.shape)
        shape[self.dim] = chunk
        padded = local.new_zeros(shape)
        padded.narrow(self.dim, 0, local.shape[self.dim]).copy_(local)
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts, dim=self.dim).narrow(self.dim, 0, self.extent)

    def any(self, flags: Tensor) -> Tensor:
        """Of each flag, whether it is set on any process that shares the matrices; all must call it."""
        if self.group is None:
            return flags
        counts = flags.to(torch.int32)
        dist.all_reduce(counts, group=self.group)
        return counts > 0

    def own(self, gathered: Tensor) -> Tensor:
        """This process's part of what `gather` gave."""
        if self.group is None:
            return gathered
        chunk = -(-self.extent // dist.get_world_size(self.group))
        begin = min(dist.get_rank(self.group) * chunk, self.extent)
        return gathered.narrow(self.dim, begin, min(chunk, self.extent - begin))


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole_shards(model: nn.Module, counts: bool = True) -> list[ParameterShard]:
    """The shards of a model that this process has all of."""
    return [
        ParameterShard(name, list(p.shape), p, [Box([0] * p.dim(), list(p.shape), 0)], counts)
        for name, p in model.named_parameters()
    ]


def dense_shard(name: str, parameter: nn.Parameter, counts: bool, group: dist.ProcessGroup) -> ParameterShard:
    """The shard of a parameter that FSDP2 has cut into rows over a group."""
    shape, local = list(parameter.shape), _local(parameter)
    chunk = -(-shape[0] // dist.get_world_size(group))
    begin = min(dist.get_rank(group) * chunk, shape[0])
    boxes = [Box([begin] + [0] * (len(shape) - 1), list(local.shape), 0)] if local.numel() else []
    return ParameterShard(name, shape, parameter, boxes, counts, group, 0, shape[0])


def expert_shard(
    name: str,
    parameter: nn.Parameter,
    num_experts: int,
    experts: Sequence[int],
    counts: bool,
    group: dist.ProcessGroup,
    dim: int,
) -> ParameterShard:
    """The shard of stacked experts, of which this process's owner has some, cut over a group.

    Args:
        name: Of the parameter.
        parameter: What FSDP2 made of the owner's experts, [owned, rows, columns].
        num_experts: E, of the whole model.
        experts: Their numbers, in order.
        counts: See `ParameterShard`.
        group: The processes that share these experts.
        dim: 0 where whole experts are dealt out, 1 where each is cut by rows.
    """
    rows, columns = parameter.shape[1:]
    local = _local(parameter)
    begin = dist.get_rank(group) * local.shape[dim]  # equal parts, see `layout.py`
    here = experts[begin : begin + local.shape[0]] if dim == 0 else experts
    first_row = begin if dim == 1 else 0
    boxes = [
        Box([first, first_row, 0], [length, local.shape[1], columns], place) for place, first, length in _runs(here)
    ]
    shape = [num_experts, rows, columns]
    shared = group if dim == 1 else None
    return ParameterShard(name, shape, parameter, boxes, counts, shared, dim, rows)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place, first number, length) of each run of consecutive numbers."""
    place = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield place, numbers[place], index - place
            place = index
