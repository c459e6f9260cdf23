"""Which process shares what with which: the axes of a run, as pure arithmetic on ranks.

    rank = (replica · expert_shards + expert_shard) · ep + ep_rank

    dp_replicate    groups with a whole model each
    dp_shard        processes of a group: dense parameters are cut over all of them (FSDP2)
    ep              those of them that share a layer's experts; dp_shard = expert_shards · ep, and each expert is cut
                    over the expert_shards processes that own it

Every process has its own rows of the batch: the axis of expert parallelism is folded into that of the data. Neighbours
in rank share experts, since launchers put neighbours on one node, where the exchange of tokens is cheapest.
"""

import dataclasses

from moe_lm.errors import InputError
from moe_lm.model.config import ModelConfig
from moe_lm.parallel.config import ParallelConfig, ParallelMode

REPLICATED_SHARE = 0.5
"""`auto` keeps a whole model on every process while its training state takes at most this share of the memory; the rest
is for activations and the copy that a save writes from."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What processes run on."""

    world_size: int = 1
    """Number of processes."""
    node_size: int = 1
    """Processes on one node."""
    memory: int = 0
    """Bytes of memory that one process can have."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the axes."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharded(self) -> bool:
        """Whether any process lacks a part of the model."""
        return self.dp_shard > 1

    @property
    def expert_shards(self) -> int:
        """Processes of a group that each expert is cut over."""
        return self.dp_shard // self.ep

    def ep_rank(self, rank: int) -> int:
        """Which of the owners of experts a process is."""
        return rank % self.ep

    def expert_shard(self, rank: int) -> int:
        """Which part of its experts a process has."""
        return rank % self.dp_shard // self.ep

    def is_first_replica(self, rank: int) -> bool:
        """Whether a process belongs to the group whose copy counts where every value counts once."""
        return rank < self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate {self.dp_replicate} × dp_shard {self.dp_shard}, ep {self.ep}"


def choose_layout(config: ParallelConfig, model: ModelConfig, machine: Machine, state_bytes: int) -> tuple[Layout, str]:
    """The layout of a run, and why, in a line for the user.

    Args:
        config: What was asked for.
        model: The model.
        machine: What there is.
        state_bytes: What one process holds of a whole model: weights, gradients, moments, compute copy.

    Raises:
        InputError: The axes do not fit the number of processes or the model.
    """
    mode, why = config.mode, ""
    if mode is ParallelMode.auto:
        mode, why = _choose_mode(config, model, machine, state_bytes)
    world = machine.world_size
    if mode is ParallelMode.single:
        if world > 1:
            raise InputError(
                f"parallel=single: {world} processes were started; start one, or choose parallel=replicated, fsdp or "
                "fsdp_ep."
            )
        if config.mode is ParallelMode.single:
            _refuse_unused(config, mode, "dp_replicate", "ep")
        return Layout(), why
    if mode is ParallelMode.replicated:
        _refuse_unused(config, mode, "dp_replicate", "ep")
        return Layout(dp_replicate=world), why
    replicas = _replicas(config, mode, machine)
    layout = Layout(replicas, world // replicas, _expert_parallel(config, mode, model, machine, world // replicas))
    _check_divisible(layout, model)
    return layout, why


def _choose_mode(
    config: ParallelConfig, model: ModelConfig, machine: Machine, state_bytes: int
) -> tuple[ParallelMode, str]:
    world, memory = machine.world_size, machine.memory
    if world == 1:
        unused = [f"parallel.{name}" for name in ("dp_replicate", "ep") if getattr(config, name) not in (None, 1)]
        why = f"parallel=single, for one process was started; {' and '.join(unused)} not used" if unused else ""
        return ParallelMode.single, why
    if config.dp_replicate is not None:
        return ParallelMode.hsdp_ep, "parallel=hsdp_ep, for parallel.dp_replicate is given"
    if config.ep is not None:
        return ParallelMode.fsdp_ep, "parallel=fsdp_ep, for parallel.ep is given"
    needs = f"the training state of a whole model takes {state_bytes / 1e9:,.2f} of {memory / 1e9:,.0f} GB"
    if state_bytes <= REPLICATED_SHARE * memory:
        return ParallelMode.replicated, f"parallel=replicated, for {needs}"
    if not model.is_mixture:
        return ParallelMode.fsdp, f"parallel=fsdp, for {needs}, and the model has no experts"
    nodes = world // machine.node_size
    if nodes > 1 and world % nodes == 0 and state_bytes / machine.node_size <= REPLICATED_SHARE * memory:
        return ParallelMode.hsdp_ep, f"parallel=hsdp_ep, for {needs}, and the processes of one node can share it"
    return ParallelMode.fsdp_ep, f"parallel=fsdp_ep, for {needs}"


def _replicas(config: ParallelConfig, mode: ParallelMode, machine: Machine) -> int:
    """dp_replicate."""
    world = machine.world_size
    if mode is not ParallelMode.hsdp_ep:
        _refuse_unused(config, mode, "dp_replicate")
        return 1
    replicas = config.dp_replicate
    if replicas is None:
        replicas = max(1, world // machine.node_size)
        if replicas == 1 and world > 1:
            raise InputError(
                f"parallel.dp_replicate=null: all {world} processes are on one node, so say how many groups shall have "
                "a whole model each, or choose parallel=fsdp_ep."
            )
    if world % replicas:
        raise InputError(
            f"parallel.dp_replicate={replicas}: must divide the number of processes, {world}; "
            f"{_said_divisors(world, world)} do."
        )
    return replicas


def _expert_parallel(
    config: ParallelConfig, mode: ParallelMode, model: ModelConfig, machine: Machine, dp_shard: int
) -> int:
    """ep: as configured, or few experts on the busiest process, with few partners, within a node."""
    if mode is ParallelMode.fsdp:
        _refuse_unused(config, mode, "ep")
        return 1
    if not model.is_mixture:
        raise InputError(f"parallel={mode.name}: a dense model has no experts to place; choose parallel=fsdp.")
    experts = model.num_experts
    if config.ep is None:
        divisors = [ep for ep in _divisors(dp_shard) if ep <= experts]
        near = [ep for ep in divisors if ep <= machine.node_size]
        even = [ep for ep in near if _fits(model, dp_shard, ep)] or [e for e in divisors if _fits(model, dp_shard, e)]
        return min(even or near, key=lambda ep: (-(-experts // ep), ep))
    if config.ep > experts:
        raise InputError(
            f"parallel.ep={config.ep}: must be at most model.num_experts={experts}, or a process has no expert."
        )
    if dp_shard % config.ep:
        raise InputError(
            f"parallel.ep={config.ep}: must divide dp_shard={dp_shard}, the processes that share one model; "
            f"{_said_divisors(dp_shard, experts)} do."
        )
    return config.ep


def _uncut(model: ModelConfig, dp_shard: int, ep: int) -> str | None:
    """A field whose size keeps each expert from being cut evenly over the processes that share it; null where none
    does, or whole experts can be dealt out.
    """
    parts = dp_shard // ep
    if not model.is_mixture or (ep == 1 and model.num_experts % parts == 0):
        return None
    rows = {"intermediate_size": 2 * model.intermediate_size, "hidden_size": model.hidden_size}
    return next((name for name, size in rows.items() if size % parts), None)


def _check_divisible(layout: Layout, model: ModelConfig) -> None:
    """Each expert's matrices are cut by rows into equal parts, unless whole experts can be dealt out."""
    if (name := _uncut(model, layout.dp_shard, layout.ep)) is not None:
        fits = [ep for ep in _divisors(layout.dp_shard) if _fits(model, layout.dp_shard, ep)]
        axes = f"parallel=fsdp_ep parallel.ep={' or '.join(map(str, fits))} does"
        remedy = axes if fits else "choose another number of processes"
        raise InputError(
            f"model.{name}={getattr(model, name)}: each expert is cut over dp_shard / ep = {layout.expert_shards} "
            f"processes, which does not divide it evenly; {remedy}."
        )


def _fits(model: ModelConfig, dp_shard: int, ep: int) -> bool:
    return ep <= model.num_experts and _uncut(model, dp_shard, ep) is None


def _refuse_unused(config: ParallelConfig, mode: ParallelMode, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) not in (None, 1):
            raise InputError(f"parallel.{name}={value}: parallel={mode.name} has no such axis; leave it out.")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _said_divisors(number: int, most: int) -> str:
    return ", ".join(str(divisor) for divisor in _divisors(number) if divisor <= most)
