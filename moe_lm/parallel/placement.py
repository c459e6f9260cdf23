"""Which rank of an expert-parallel group owns which expert, and what a placement costs.

Every layer is a barrier: its ranks wait for the one that computes longest. A placement is therefore judged by

    seconds of a step = Σ over layers of max over ranks of the rank's seconds
    rank's seconds    = rows · seconds_per_row                                             its experts
                      + rows · bytes_per_row · (s − 1)/ep / bandwidth_in_node              from ranks of its node
                      + rows of its node · bytes_per_row · (ep − s)/ep / bandwidth_between_nodes

for a rank whose experts are sent `rows`, on a node with s ranks of the group. Rows come from all ranks in equal parts,
so of each ep a rank keeps one to itself, has s − 1 from its node, and ep − s from other nodes, over a link that the
ranks of a node share. The parts are added up, as if nothing overlapped.

Letters: L layers, E experts, R ranks of the group, N nodes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lm.errors import InputError
from moe_lm.files import write_atomically


@dataclass(frozen=True)
class Placement:
    """The owner of every expert. Ranks may own different numbers of experts, each at least one in every layer."""

    owners: tuple[tuple[int, ...], ...]
    """Rank in the expert-parallel group of each expert, [L][E]."""
    ep: int
    """Number of ranks in the group."""

    def __post_init__(self) -> None:
        assert self.owners and len({len(owners_E) for owners_E in self.owners}) == 1, "layers of equal numbers"
        for owners_E in self.owners:
            assert set(owners_E) == set(range(self.ep)), f"each of {self.ep} ranks owns an expert: {owners_E}"

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.owners)

    @property
    def num_experts(self) -> int:
        """E, of each layer."""
        return len(self.owners[0])

    def experts_of(self, layer: int, rank: int) -> tuple[int, ...]:
        """Global numbers of a rank's experts in a layer, ascending."""
        return tuple(expert for expert, owner in enumerate(self.owners[layer]) if owner == rank)


def contiguous(num_layers: int, num_experts: int, ep: int) -> Placement:
    """Experts in order: runs whose lengths differ by at most one, the longer ones first."""
    assert 1 <= ep <= num_experts, (num_experts, ep)
    shorter, longer = divmod(num_experts, ep)
    owners_E = tuple(rank for rank in range(ep) for _ in range(shorter + (rank < longer)))
    return Placement((owners_E,) * num_layers, ep)


@dataclass(frozen=True)
class Cluster:
    """The ranks of an expert-parallel group, and what a routed row costs them.

    The defaults are Mixtral 8x7B's layer (D = 4096, F = 14336) on nodes of eight H100: of another model or machine the
    seconds will differ, the ratio of two placements' seconds hardly, while computing takes longer than sending.
    """

    ep: int
    """Number of ranks in the group."""
    ranks_per_node: int | None = None
    """Of the group; its first rank is the first of a node, so the last node may have fewer. null means all."""
    max_experts_per_rank: int | None = None
    """What fits into a rank's memory, in each layer; null for any number."""
    seconds_per_row: float = 2.6e-6
    """Forward and backward of one row in one expert: 18·D·F FLOPs, at 400 TFLOP/s."""
    bytes_per_row: float = 32768.0
    """Dispatch and combine, forward and backward: 4·D values of bf16."""
    bandwidth_in_node: float = 450e9
    """Bytes per second that a rank receives from, or sends to, its own node: NVLink 4."""
    bandwidth_between_nodes: float = 400e9
    """Bytes per second that a node receives or sends, shared by its ranks: eight links of 400 Gbit/s."""

    def __post_init__(self) -> None:
        assert self.ep >= 1 and self.ranks_per_node != 0 and self.max_experts_per_rank != 0, self
        assert min(self.seconds_per_row, self.bandwidth_in_node, self.bandwidth_between_nodes) > 0, self
        assert self.bytes_per_row >= 0, self

    @property
    def nodes(self) -> list[range]:
        """Ranks of each node."""
        size = self.ranks_per_node or self.ep
        return [range(first, min(first + size, self.ep)) for first in range(0, self.ep, size)]

    def row_seconds(self, ranks: int) -> tuple[float, float]:
        """What a row costs the rank that it is for, and what it costs every rank of that rank's node, of `ranks`."""
        bytes_per_source = self.bytes_per_row / self.ep
        own = self.seconds_per_row + bytes_per_source * (ranks - 1) / self.bandwidth_in_node
        return own, bytes_per_source * (self.ep - ranks) / self.bandwidth_between_nodes

    def most_experts(self, num_experts: int) -> int:
        """The most experts that one rank can own, when every other rank owns one."""
        most = num_experts - self.ep + 1
        return most if self.max_experts_per_rank is None else min(most, self.max_experts_per_rank)


@dataclass(frozen=True)
class Straggler:
    """How long a group waits for its slowest rank."""

    ratio: float
    """Slowest rank's seconds over the mean rank's, both summed over layers; 1 where no rank waits."""
    seconds: float
    """Of the slowest ranks, summed over layers."""


def rank_seconds(owners_E: Sequence[int], count_E: Sequence[int], cluster: Cluster) -> list[float]:
    """Each rank's seconds in one layer, [R], by the formula above.

    Args:
        owners_E: Rank of each expert.
        count_E: Rows routed to each expert, from all ranks of the group.
        cluster: The group.
    """
    load_R = [0] * cluster.ep
    for owner, count in zip(owners_E, count_E, strict=True):
        load_R[owner] += count
    seconds_R = []
    for ranks in cluster.nodes:
        own, shared = cluster.row_seconds(len(ranks))
        node_load = sum(load_R[rank] for rank in ranks)
        seconds_R += [own * load_R[rank] + shared * node_load for rank in ranks]
    return seconds_R


def straggler(placement: Placement, count_LE: Sequence[Sequence[int]], cluster: Cluster) -> Straggler:
    """How long the slowest ranks of a placement take, and how much longer than the mean rank.

    Args:
        placement: Of all layers.
        count_LE: Rows routed to each expert. Of the sum over several steps this is what those steps take at least: a
            rank that is slowest in one of them only is averaged away.
        cluster: The group; of the placement's `ep`.
    """
    assert placement.ep == cluster.ep
    seconds_LR = [rank_seconds(*layer, cluster) for layer in zip(placement.owners, count_LE, strict=True)]
    slowest = sum(max(seconds_R) for seconds_R in seconds_LR)
    mean = sum(sum(seconds_R) for seconds_R in seconds_LR) / cluster.ep
    return Straggler(slowest / mean if mean else 1.0, slowest)


def lower_bound(count_E: Sequence[int], cluster: Cluster) -> float:
    """Seconds that no placement of a layer can go below.

    Some rank has the mean load, the busiest expert, and, by the pigeonhole principle, k + 1 of the k·R + 1 busiest
    experts; with few experts to a rank at most, every rank has some at least. So let a rank of node n have a load of X.
    If all nodes end by time T, node m has at most T·k_m rows, so that n has the others: T ≥ a_n·X + b_n·(total − T·(K −
    k_n)), where a, b are `row_seconds`, 1/k_m = a_m/s_m + b_m and K = Σ k. Also T·K ≥ total.
    """
    ep, total = cluster.ep, sum(count_E)
    falling = sorted(count_E, reverse=True)
    fewest = len(falling) - (ep - 1) * cluster.most_experts(len(falling))
    load = max(-(-total // ep), falling[0] + sum(falling[::-1][: max(fewest, 1) - 1]))
    for each in range(1, (len(falling) - 1) // ep + 1):
        load = max(load, sum(falling[each * (ep - 1) : each * ep + 1]))
    costs = [(*cluster.row_seconds(len(ranks)), len(ranks)) for ranks in cluster.nodes]
    rate_N = [1 / (own / ranks + shared) for own, shared, ranks in costs]
    with_load = []
    for (own, shared, _), rate in zip(costs, rate_N):
        others = shared * (sum(rate_N) - rate)
        with_load.append(max((own + shared) * load, (own * load + shared * total) / (1 + others)))
    return max(min(with_load), total / sum(rate_N))


def write_placement(path: Path, placement: Placement) -> None:
    """Write a placement as JSON that a person can edit: for each layer one line, for each rank the list of its experts.

    Raises:
        OSError: It can not be written.
    """
    layers = [
        [placement.experts_of(layer, rank) for rank in range(placement.ep)] for layer in range(placement.num_layers)
    ]
    lines = ",\n".join(f"    {json.dumps(experts_R)}" for experts_R in layers)
    text = f'{{\n  "num_experts": {placement.num_experts},\n  "ep": {placement.ep},\n  "layers": [\n{lines}\n  ]\n}}\n'
    write_atomically(path, text.encode())


def is_placement(path: Path) -> bool:
    """Whether a file looks like what `write_placement` writes."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() == {"num_experts", "ep", "layers"}


def read_placement(path: Path, num_layers: int, num_experts: int, ep: int) -> Placement:
    """Read what `write_placement` or a person wrote.

    Raises:
        InputError: It can not be read, is for another model or group, or misses or doubles an expert.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise InputError("must hold an object with num_experts, ep and layers.")
        for name, value in (("num_experts", num_experts), ("ep", ep)):
            if content.get(name) != value or isinstance(content[name], bool):
                found = json.dumps(content.get(name))
                raise InputError(f"is for {name}={found}, but this run has {name}={value}; make one for this run.")
        layers = _list_of(content.get("layers"), num_layers, "layers", "layers")
        return Placement(tuple(_owners(ranks, i, num_experts, ep) for i, ranks in enumerate(layers)), ep)
    except FileNotFoundError as error:
        reason = "there is no such file; `moe-lm plan placement output=FILE` writes one."
        raise InputError(f"parallel.placement_file={path}: {reason}") from error
    except OSError as error:
        raise InputError(f"parallel.placement_file={path}: can not be read ({error.strerror}); give a file.") from error
    except InputError as error:
        raise InputError(f"parallel.placement_file={path}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = f"is not JSON ({error}); `moe-lm plan placement output=FILE` writes one."
        raise InputError(f"parallel.placement_file={path}: {reason}") from error


def _owners(ranks: Any, layer: int, num_experts: int, ep: int) -> tuple[int, ...]:
    """The owners of a layer's experts, from the lists of each rank's."""
    owners: dict[int, int] = {}
    for rank, experts in enumerate(_list_of(ranks, ep, f"layer {layer}", "lists, one of each rank's experts")):
        where = f"layer {layer}, rank {rank}"
        for expert in _list_of(experts, None, where, "expert numbers"):
            if type(expert) is not int or not 0 <= expert < num_experts:
                raise InputError(f"{where}: there is no expert {json.dumps(expert)}; give 0 to {num_experts - 1}.")
            if expert in owners:
                raise InputError(f"{where}: expert {expert} is already given to rank {owners[expert]}; give it once.")
            owners[expert] = rank
        if not experts:
            raise InputError(f"{where}: has no expert; give every rank at least one.")
    if missed := [expert for expert in range(num_experts) if expert not in owners]:
        raise InputError(f"layer {layer}: expert {missed[0]} is given to no rank; add it to one.")
    return tuple(owners[expert] for expert in range(num_experts))


def _list_of(value: Any, length: int | None, name: str, content: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{name}: must be a list of {content}.")
    if length is not None and len(value) != length:
        raise InputError(f"{name}: has {len(value)} {content}, but this run needs {length}; make one for this run.")
    return value
