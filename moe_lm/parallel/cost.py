"""What a training step puts on the wire, as formulas: bytes that one process sends, by kind of collective.

Counted as ring algorithms send them: an all-gather or reduce-scatter of parts of n bytes over W processes (W − 1)·n, an
all-reduce of n bytes 2·(W − 1)/W·n, an all-to-all what the process does not keep. A test compares them with the bytes
of every collective that a step really asks for, for each layout it tries.

For each micro-batch, of every parameter that is cut over W processes into parts of ⌈rows/W⌉ rows:

    all-gather        forward, and again backward; once for embedding, final norm and head, which stay in between
    reduce-scatter    its gradient, in fp32
    all-to-all        of each layer: E numbers of rows, then the rows themselves, there and back, forward and backward:
                      2·(S + Q)·D values for S rows sent to other processes and Q received from them, and S + Q weights
                      and their gradients (with a capacity C there are no numbers, and C rows to and from every expert;
                      activations that are computed again repeat the forward's part)

and once a step: the all-reduce of gradient parts over replicas, of losses, expert counts and the norm, and Muon's
all-gathers of the matrices it orthogonalises.

Letters: L layers, E experts, D hidden, F intermediate, N and G heads and key/value heads, H head size, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

from moe_lm.model.config import LoadSource, ModelConfig
from moe_lm.model.router import expert_capacity
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.parallelize import expert_dim
from moe_lm.parallel.placement import Placement

MASTER_BYTES = 4
"""Size of a number of weights and gradients between processes: fp32."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends."""

    all_gather: Fraction = Fraction()
    reduce_scatter: Fraction = Fraction()
    all_reduce: Fraction = Fraction()
    all_to_all: Fraction = Fraction()

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def total(self) -> Fraction:
        """Of all kinds."""
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.all_to_all


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does besides the model's shape."""

    micro_batches: int = 1
    compute_bytes: int = 2
    """Size of a number that is computed with."""
    master_bytes: int = MASTER_BYTES
    recompute: bool = False
    """Whether activations are computed again in the backward: the forward's exchanges are then made twice."""
    muon_bytes: int = 0
    """Size of a gathered number of the momentum of orthogonalised matrices: 2 where bf16 is fast, else
    4; 0 without Muon."""
    rows_sent: int = 0
    """Rows that this process sends to other owners of experts in a whole step, over all layers and micro-batches."""
    rows_received: int = 0
    """Rows that it receives from them."""
    tokens: int = 0
    """Of a micro-batch of one process; asked for where experts have a capacity, which then sets the rows."""


def step_traffic(
    model: ModelConfig, layout: Layout, work: Work, placement: Placement | None = None, ep_rank: int = 0
) -> dict[str, Traffic]:
    """What one process sends in a step, by the group of processes that it goes to.

    Args:
        model: The model.
        layout: The axes.
        work: What the step does.
        placement: Who owns which expert, under expert parallelism.
        ep_rank: Which of the owners the process is.

    Returns:
        Traffic of "all" (sums, and gradients where each process has a whole model), "dense shards", "dense replicas",
        "expert shards", "expert replicas" and "expert parallel"; groups of one process send nothing.
    """
    if layout.world_size == 1:
        return {}
    groups = {"all": _sums(model, layout, work)}
    if not layout.sharded:
        parameters = sum(map(math.prod, _dense(model))) + sum(map(math.prod, _all_experts(model)))
        groups["all"] += _all_reduce(layout.world_size, parameters * work.master_bytes)
        return groups
    parts, layers = layout.dp_shard, model.num_hidden_layers
    of_layers = (_attention_and_norms(model) + ([] if model.is_mixture else _feed_forward(model))) * layers
    dense = Traffic()
    for shapes, gathers, size in (
        (_root(model), 1, work.compute_bytes),
        (of_layers, 2, work.compute_bytes),
        (_gates(model), 2, max(work.compute_bytes, work.master_bytes)),
    ):
        dense += _shards(sum(_part(shape, 0, parts) for shape in shapes), gathers, parts, work, size)
    if work.muon_bytes:
        matrices = [shape for shape in of_layers if len(shape) == 2]
        dense += _muon(sum(_part(shape, 0, parts) for shape in matrices), len(matrices), parts, work)
    values = sum(_part(shape, 0, parts) for shape in _root(model) + of_layers + _gates(model))
    groups |= {"dense shards": dense, "dense replicas": _all_reduce(layout.dp_replicate, values * work.master_bytes)}
    return groups | (_expert_traffic(model, layout, work, placement, ep_rank) if model.is_mixture else {})


def _sums(model: ModelConfig, layout: Layout, work: Work) -> Traffic:
    """Losses, expert counts and the norm."""
    counts = model.num_hidden_layers * model.num_experts if model.is_mixture else 0
    values = 5 + counts  # four losses and what was dropped
    if model.load_balancing_source is LoadSource.micro_batch:
        values += counts * work.micro_batches
    squared_norm = 8 if layout.sharded else 0  # fp64
    return _all_reduce(layout.world_size, values * work.master_bytes + squared_norm)


def _expert_traffic(
    model: ModelConfig, layout: Layout, work: Work, placement: Placement | None, ep_rank: int
) -> dict[str, Traffic]:
    """Of experts, cut over the processes that share them, and of the rows that travel to their owners."""
    parts, shards, replicas, numbers = layout.expert_shards, Traffic(), Traffic(), 0
    sent, received = work.rows_sent, work.rows_received
    for layer in range(model.num_hidden_layers):
        owned = model.num_experts if placement is None else len(placement.experts_of(layer, ep_rank))
        dim = expert_dim(owned, layout)
        values = sum(_part(shape, dim, parts) for shape in _experts(model, owned))
        shards += _shards(values, 2, parts, work, work.compute_bytes)
        if work.muon_bytes and dim == 1:
            shards += _muon(values, 2 * owned, parts, work)
        replicas += _all_reduce(layout.dp_replicate, values * work.master_bytes)
        if layout.ep == 1:
            continue
        if (factor := model.capacity_factor) is None:
            numbers += (model.num_experts - owned) * work.micro_batches
        else:
            capacity = expert_capacity(factor, work.tokens * model.num_experts_per_tok, model.num_experts)
            sent += (model.num_experts - owned) * capacity * work.micro_batches
            received += owned * (layout.ep - 1) * capacity * work.micro_batches
    forward = 2 if work.recompute else 1
    # Rows there and back and, the other way, their gradients; with a weight each, which comes back as a gradient.
    values = (forward + 1) * (sent + received) * model.hidden_size + forward * sent + received
    travel = forward * 8 * numbers + values * work.compute_bytes
    exchange = Traffic(all_to_all=Fraction(travel))
    return {"expert shards": shards, "expert replicas": replicas, "expert parallel": exchange}


def _shards(values: int, gathers: int, parts: int, work: Work, size: int) -> Traffic:
    """Of parameters cut over so many processes, of which each has so many values."""
    each = (parts - 1) * values * work.micro_batches
    return Traffic(Fraction(gathers * each * size), Fraction(each * work.master_bytes))


def _muon(values: int, matrices: int, parts: int, work: Work) -> Traffic:
    """Of the momentum of matrices, of which a process has so many values, and whether each has a gradient at all."""
    return Traffic(Fraction((parts - 1) * values * work.muon_bytes)) + _all_reduce(parts, 4 * matrices)


def _all_reduce(processes: int, num_bytes: int) -> Traffic:
    return Traffic(all_reduce=Fraction(2 * (processes - 1) * num_bytes, processes))


def _part(shape: Sequence[int], dim: int, parts: int) -> int:
    """Values of the largest part; smaller ones are filled up to it on the wire."""
    return -(-shape[dim] // parts) * math.prod(shape) // shape[dim]


def _root(model: ModelConfig) -> list[list[int]]:
    table = [[model.vocab_size, model.hidden_size]]
    return table * (1 if model.tie_word_embeddings else 2) + [[model.hidden_size]]


def _attention_and_norms(model: ModelConfig) -> list[list[int]]:
    """Of one layer."""
    hidden = model.hidden_size
    queries, keys = (n * model.width_of_head for n in (model.num_attention_heads, model.num_key_value_heads))
    return [[queries, hidden], [keys, hidden], [keys, hidden], [hidden, queries], [hidden], [hidden]]


def _gates(model: ModelConfig) -> list[list[int]]:
    return [[model.num_experts, model.hidden_size]] * model.num_hidden_layers if model.is_mixture else []


def _feed_forward(model: ModelConfig) -> list[list[int]]:
    """Of one layer of a dense model."""
    hidden, inner = model.hidden_size, model.intermediate_size
    return [[inner, hidden], [inner, hidden], [hidden, inner]]


def _experts(model: ModelConfig, owned: int) -> list[list[int]]:
    """Of one layer and owner."""
    hidden, inner = model.hidden_size, model.intermediate_size
    return [[owned, 2 * inner, hidden], [owned, hidden, inner]]


def _dense(model: ModelConfig) -> list[list[int]]:
    """Everything but experts."""
    return _root(model) + _attention_and_norms(model) * model.num_hidden_layers + _gates(model)


def _all_experts(model: ModelConfig) -> list[list[int]]:
    one = _experts(model, model.num_experts) if model.is_mixture else _feed_forward(model)
    return one * model.num_hidden_layers
