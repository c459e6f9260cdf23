"""The search for a placement in which no rank of a layer is much slower than the others.

`balanced` makes each layer's max small: experts are dealt by falling load, moved and swapped, and then a search by
branch and bound looks for anything better. With 8 experts it proves its answer within a few hundred steps
(milliseconds); with 64 over 16 ranks it gives up, and the gap to a lower bound says how far from the best the answer
can be at most: 2 % for log-normal loads with a spread of 0.3, 4 % with 1.0. Nothing is random and ties are broken by
number: every process that computes a placement from the same counts has the same one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lm.parallel.placement import Cluster, Placement, contiguous, lower_bound

SEARCH_BUDGET = 64_000
"""Ranks that the search looks at for one layer before it gives up, ep for every expert that it places: about 0.1 s."""

_ROUNDING = 1e-12
"""Times that differ by this part of themselves are the same."""


@dataclass(frozen=True)
class Balanced:
    """What `balanced` found."""

    placement: Placement
    gap_L: tuple[float, ...]
    """Each layer's seconds are at most 1 + gap of the fewest possible; exactly 0 where that is proven to be none."""

    @property
    def optimal(self) -> tuple[bool, ...]:
        """Whether a layer is proven to have the fewest possible seconds."""
        return tuple(gap == 0 for gap in self.gap_L)


def balanced(count_LE: Sequence[Sequence[int]], cluster: Cluster) -> Balanced:
    """A placement that makes each layer's slowest rank as fast as can be; never slower than `contiguous`.

    Args:
        count_LE: Rows routed to each expert, over any number of steps.
        cluster: The group; every rank gets at least one expert of each layer, and at most its `max_experts_per_rank`.
    """
    num_experts = len(count_LE[0])
    assert cluster.ep <= num_experts <= cluster.ep * (cluster.max_experts_per_rank or num_experts), "no placement fits"
    layers = [_balance(count_E, cluster) for count_E in count_LE]
    return Balanced(Placement(tuple(owners_E for owners_E, _ in layers), cluster.ep), tuple(gap for _, gap in layers))


def _balance(count_E: Sequence[int], cluster: Cluster) -> tuple[tuple[int, ...], float]:
    """One layer's owners and their gap: the better of two starts, and better ones than that by exact search."""
    bound = lower_bound(count_E, cluster)
    in_order = _Layer(count_E, cluster, contiguous(1, len(count_E), cluster.ep).owners[0])
    dealt = _Layer(count_E, cluster)
    _deal(dealt, _by_load(count_E))
    _improve(dealt)
    best = min(in_order, dealt, key=_Layer.seconds)
    search = _Search(best, cluster, bound)
    search.descend()
    return search.owners_E, 0.0 if search.has_proof else search.seconds / bound - 1


def _by_load(count_E: Sequence[int]) -> list[int]:
    return sorted(range(len(count_E)), key=lambda expert: (-count_E[expert], expert))


class _Layer:
    """One layer on its way to a placement: experts are put and taken, loads and sizes follow."""

    def __init__(self, count_E: Sequence[int], cluster: Cluster, owners_E: Sequence[int] = ()):
        self.count_E = count_E
        self.ranks_N = cluster.nodes
        self.cost_N = [cluster.row_seconds(len(ranks)) for ranks in self.ranks_N]
        self.node_R = [node for node, ranks in enumerate(self.ranks_N) for _ in ranks]
        self.most = cluster.most_experts(len(count_E))
        self.owners_E = [-1] * len(count_E)
        self.load_R, self.size_R = [0] * cluster.ep, [0] * cluster.ep
        self.load_N, self.size_N = [0] * len(self.ranks_N), [0] * len(self.ranks_N)
        for expert, rank in enumerate(owners_E):
            self.put(expert, rank)

    def put(self, expert: int, rank: int) -> None:
        """Give an expert to a rank."""
        self.owners_E[expert] = rank
        self._add(self.count_E[expert], 1, rank)

    def take(self, expert: int) -> int:
        """Take an expert from the rank that is returned."""
        rank, self.owners_E[expert] = self.owners_E[expert], -1
        self._add(-self.count_E[expert], -1, rank)
        return rank

    def _add(self, load: int, size: int, rank: int) -> None:
        node = self.node_R[rank]
        self.load_R[rank] += load
        self.size_R[rank] += size
        self.load_N[node] += load
        self.size_N[node] += size

    def node_seconds(self, node: int) -> float:
        """Of the node's slowest rank."""
        own, shared = self.cost_N[node]
        return own * max([self.load_R[rank] for rank in self.ranks_N[node]]) + shared * self.load_N[node]

    def seconds(self) -> float:
        """Of the slowest rank."""
        return max(map(self.node_seconds, range(len(self.ranks_N))))

    def seconds_with(self, rows: int, rank: int) -> float:
        """Of the slowest rank on a rank's node, if that rank had so many rows more."""
        self._add(rows, 0, rank)
        seconds = self.node_seconds(self.node_R[rank])
        self._add(-rows, 0, rank)
        return seconds

    def seconds_after(self, rows: int, source: int, target: int) -> float:
        """Of the slower of two ranks, or the slowest on their nodes, if so many rows went from one to the other."""
        node = self.node_R[source]
        if node == self.node_R[target]:
            own, shared = self.cost_N[node]
            return own * max(self.load_R[source] - rows, self.load_R[target] + rows) + shared * self.load_N[node]
        return max(self.seconds_with(-rows, source), self.seconds_with(rows, target))

    def open_ranks(self, left: int) -> list[int]:
        """Ranks that may have the next of `left` experts, so that none ends without one."""
        empty = [rank for rank, size in enumerate(self.size_R) if not size]
        return empty if len(empty) == left else [r for r, size in enumerate(self.size_R) if size < self.most]

    def room(self, seconds: float, smallest: int) -> int:
        """Rows that still fit in, in experts of at least `smallest` rows, if every rank shall end before `seconds`."""
        room, seconds = 0, seconds * (1 - _ROUNDING)
        for (own, shared), ranks, load in zip(self.cost_N, self.ranks_N, self.load_N):
            most = math.floor((seconds - shared * load) / own)
            rooms = [most - self.load_R[rank] for rank in ranks if self.size_R[rank] < self.most]
            together = math.floor(seconds / (own / len(ranks) + shared)) - load
            room += max(0, min(together, sum([rows for rows in rooms if rows >= smallest])))
        return room


def _deal(layer: _Layer, experts: Sequence[int]) -> None:
    """Longest processing time first: each expert, by falling load, to the rank whose node then ends first."""
    for done, expert in enumerate(experts):
        rows, ranks = layer.count_E[expert], layer.open_ranks(len(experts) - done)
        layer.put(expert, min(ranks, key=lambda rank: (layer.seconds_with(rows, rank), layer.load_R[rank], rank)))


def _improve(layer: _Layer) -> None:
    """Move or swap experts of the node that ends last, the best change first, until none makes that end earlier."""
    while True:
        changes = [(layer.seconds_after(*change[:3]), *change) for change in _changes(layer)]
        after, _, source, target, expert, other = min(changes, default=(math.inf, 0, 0, 0, 0, -1))
        if after >= layer.seconds():
            return
        layer.take(expert)
        layer.put(expert, target)
        if other >= 0:
            layer.take(other)
            layer.put(other, source)


def _changes(layer: _Layer) -> Iterator[tuple[int, int, int, int, int]]:
    """What may relieve the node that ends last: (rows, from, to, expert, and the one that comes back, or −1)."""
    last = max(range(len(layer.ranks_N)), key=layer.node_seconds)
    slowest, seconds = max(layer.ranks_N[last], key=layer.load_R.__getitem__), layer.node_seconds(last)
    experts_R: list[list[int]] = [[] for _ in layer.load_R]
    for expert, rank in enumerate(layer.owners_E):
        experts_R[rank].append(expert)
    for target, others in enumerate(experts_R):
        node = layer.node_R[target]
        (own, shared), load = layer.cost_N[node], layer.load_R[target]
        # Within the node only the slowest rank counts; to another node each of its ranks can give.
        if node == last:
            sources, fits = range(slowest, slowest + 1), float(layer.load_R[slowest] - load)
        else:
            sources, fits = layer.ranks_N[last], (seconds - shared * layer.load_N[node] - own * load) / (own + shared)
        for source in sources:
            moves = [-1] if layer.size_R[source] > 1 and layer.size_R[target] < layer.most else []
            for expert in experts_R[source]:
                for other in moves + others:
                    rows = layer.count_E[expert] - (layer.count_E[other] if other >= 0 else 0)
                    if 0 < rows < fits:
                        yield rows, source, target, expert, other


class _Search:
    """Branch and bound over the owners of the experts, by falling load, from a placement that is known.

    Ranks of a node that have the same load and number of experts are the same, and so are empty nodes of the same size:
    one of them is tried. Not followed are placements that can not end before the best one known: a rank is as late
    already, or the remaining rows are more than what the ranks could take until then.
    """

    def __init__(self, best: _Layer, cluster: Cluster, bound: float):
        self.owners_E, self.seconds, self._bound = tuple(best.owners_E), best.seconds(), bound
        self._layer = _Layer(best.count_E, cluster)
        self._experts = _by_load(best.count_E)
        self._count = [count for expert in self._experts if (count := best.count_E[expert])]
        # Hundreds of experts are beyond any proof, and a stack so deep beyond Python.
        self._left = SEARCH_BUDGET // cluster.ep if len(self._experts) <= 256 else 0

    @property
    def has_proof(self) -> bool:
        """Whether the search, once it has returned, knows that no placement is better."""
        return self._left > 0 or self._reached_bound

    @property
    def _reached_bound(self) -> bool:
        return self.seconds <= self._bound * (1 + _ROUNDING)

    def descend(self, depth: int = 0) -> None:
        """Try all owners of the experts from the `depth`-th on."""
        if depth == len(self._count):
            self._keep_if_better(self._experts[depth:])
            return
        layer, rows, after = self._layer, self._count[depth], sum(self._count[depth + 1 :])
        for seconds, rank in self._choices(rows, len(self._experts) - depth):
            if self._left <= 0 or self._reached_bound or seconds >= self.seconds * (1 - _ROUNDING):
                return
            self._left -= 1
            layer.put(self._experts[depth], rank)
            if layer.room(self.seconds, self._count[-1]) >= after:
                self.descend(depth + 1)
            layer.take(self._experts[depth])

    def _choices(self, rows: int, left: int) -> list[tuple[float, int]]:
        """Ranks that differ, the one whose node then ends first before the others."""
        layer = self._layer
        different: dict[tuple[int, int, int], int] = {}
        for rank in layer.open_ranks(left):
            node = layer.node_R[rank]
            which = node if layer.size_N[node] else -len(layer.ranks_N[node])
            different.setdefault((which, layer.load_R[rank], layer.size_R[rank]), rank)
        return sorted((layer.seconds_with(rows, rank), rank) for rank in different.values())

    def _keep_if_better(self, without_rows: list[int]) -> None:
        """Every expert that has rows is placed; the others cost nothing wherever they are."""
        if (seconds := self._layer.seconds()) < self.seconds * (1 - _ROUNDING):
            _deal(self._layer, without_rows)
            self.owners_E, self.seconds = tuple(self._layer.owners_E), seconds
            for expert in without_rows:
                self._layer.take(expert)
