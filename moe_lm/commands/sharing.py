"""How the processes of a run share it: checks that all started alike, the layout, and the placement of experts."""

import dataclasses
import hashlib
import json
import os
import platform
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_lm.config import written
from moe_lm.data.loader import validate_batch_sizes
from moe_lm.data.streams import check_world_size
from moe_lm.errors import InputError
from moe_lm.kernels.newton_schulz import iteration_dtype
from moe_lm.model.accounting import activation_bytes, count_parameters
from moe_lm.parallel.config import PlacementPolicy
from moe_lm.parallel.layout import Layout, Machine, choose_layout
from moe_lm.parallel.placement import Cluster, Placement, contiguous, read_placement
from moe_lm.parallel.placement_search import balanced
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.trace import read_steps, summed
from moe_lm.plain import flatten, to_plain
from moe_lm.training.config import OptimizerName, RunConfig
from moe_lm.training.machine import total_memory
from moe_lm.training.precision import compute_dtype
from moe_lm.training.start import Start

PLACEMENT_FILE = "placement.json"
"""In the run's directory: who owns which expert, as the run last started."""

TRACE_STEPS = 50
"""Logged steps that a balanced placement looks back on."""


def check_alike(config: RunConfig, runtime: Runtime) -> None:
    """Refuse processes that were started with different options, run different code, or compute in different types."""
    if runtime.world_size == 1:
        return
    muon = config.optimizer.name is OptimizerName.muon
    types = {
        "device": runtime.device.type,
        f"type of trainer.precision={config.trainer.precision.name}": str(
            compute_dtype(config.trainer.precision, runtime.device)
        ),
        **({"type of Muon's iteration": str(iteration_dtype(runtime.device))} if muon else {}),
    }
    mine = {
        **{name: written(value) for name, value in flatten(to_plain(config)).items()},
        "python": platform.python_version(),
        **{f"version of {name}": version(name) for name in ("torch", "transformers", "accelerate")},
        "code of moe_lm": _code_fingerprint()[:12],
        **types,  # last: another option is not another machine
    }
    everyone = [json.loads(text) for text in runtime.gather(json.dumps(mine))]

    def compare() -> None:
        for rank, theirs in enumerate(everyone):
            for name in {**everyone[0], **theirs}:
                ours, other = everyone[0].get(name), theirs.get(name)
                if ours != other:
                    remedy = "on machines of one kind" if name in types else "with the same options and the same code"
                    raise InputError(
                        f"{name}: is {ours} on process 0 and {other} on process {rank}; start all processes {remedy}."
                    )

    runtime.on_main(compare)


def check_shared(config: RunConfig, directory: Path, runtime: Runtime) -> None:
    """Refuse processes that do not see the run's directory of the main one: they could not save or resume with it."""
    if runtime.world_size == 1:
        return
    mark = directory / runtime.decide(lambda: f".seen-{secrets.token_hex(8)}")  # a name that nobody has looked for yet
    runtime.on_main(mark.touch)
    seen = runtime.gather("seen" if os.path.exists(mark) else "")  # false too where it may not look

    def compare() -> None:
        mark.unlink()
        if "" in seen:
            raise InputError(
                f"output_dir={config.output_dir}: process {seen.index('')} does not see what process 0 writes to "
                f"{directory}; give a directory that all machines share."
            )

    runtime.on_main(compare)


def _code_fingerprint() -> str:
    """SHA-256 of this package's source."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".inc")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def share(
    config: RunConfig, runtime: Runtime, directory: Path, start: Start
) -> tuple[Layout, Placement | None, list[str]]:
    """The layout of a run, who owns which expert, and what to tell the user of them; by the main process's word.

    Raises:
        InputError: Batch, streams, axes or memory do not fit the number of processes, or the placement's file is wrong.
    """

    def choose() -> list[Any]:
        layout, why = _choose_layout(config, runtime, start)
        placement, who = _choose_placement(config, layout, directory)
        return [dataclasses.astuple(layout), placement and placement.owners, [text for text in (why, who) if text]]

    axes, owners, said = runtime.decide(choose)
    layout = Layout(*axes)
    return layout, owners and Placement(tuple(map(tuple, owners)), layout.ep), said


def _choose_layout(config: RunConfig, runtime: Runtime, start: Start) -> tuple[Layout, str]:
    """The layout of a run and why it was chosen."""
    world, trainer = runtime.world_size, config.trainer
    validate_batch_sizes(trainer.global_batch_size, trainer.micro_batch_size, world)
    if config.data.streaming:
        check_world_size(config.data.num_streams, world)
    node_size, memory = _node_size(world), total_memory(runtime.device)
    if runtime.device.type == "cpu":
        memory //= node_size
    moments = 1 if config.optimizer.name is OptimizerName.muon else 2
    dtype = compute_dtype(trainer.precision, runtime.device)
    whole, copied = start.state_bytes(moments, dtype.itemsize)
    if runtime.device.type == "cpu" and config.checkpoint.background:
        whole += copied
    layout, why = choose_layout(config.parallel, config.model, Machine(world, node_size, memory), whole)
    if whole // layout.dp_shard > memory:
        count, device = count_parameters(config.model).total, runtime.device.type
        among = f" shared by {layout.dp_shard} processes" if layout.sharded else ""
        raise InputError(
            f"model: {count / 1e9:.1f} B parameters{among} need {whole / layout.dp_shard / 2**30:,.0f} GiB for "
            f"weights, gradients, moments and the copy for saving alone, and this {device} has {memory / 2**30:,.0f} "
            "GiB for each process; choose a smaller model, or share it among more processes (parallel=fsdp_ep)."
        )
    rows, length, recompute = trainer.micro_batch_size, config.data.sequence_length, trainer.activation_checkpointing
    kept = activation_bytes(config.model, rows * length, recompute, dtype.itemsize)
    if config.data.mask_documents and runtime.device.type == "cpu":
        kept += rows * length**2  # who sees whom, in bytes
    if whole // layout.dp_shard + kept > memory:
        raise InputError(
            f"trainer.micro_batch_size={rows}: so many rows of {length} tokens need {kept / 2**30:,.0f} GiB for "
            f"activations alone, beside {whole / layout.dp_shard / 2**30:,.0f} of the model's, and this "
            f"{runtime.device.type} has {memory / 2**30:,.0f} GiB for each process; give fewer, or a smaller "
            "data.sequence_length."
        )
    return layout, why


def _node_size(world_size: int) -> int:
    """Processes that the launcher has started on this node."""
    return max(1, min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _choose_placement(config: RunConfig, layout: Layout, directory: Path) -> tuple[Placement | None, str]:
    """Who owns which expert, and a word about it; null without expert parallelism."""
    if layout.ep == 1:
        if config.parallel.placement is PlacementPolicy.file:
            raise InputError(f"parallel.placement=file: there is nothing to place with {layout}; leave it out.")
        return None, ""
    layers, experts, policy = config.model.num_hidden_layers, config.model.num_experts, config.parallel.placement
    if policy is PlacementPolicy.file:
        assert config.parallel.placement_file is not None
        path = Path(config.parallel.placement_file).expanduser()
        return read_placement(path, layers, experts, layout.ep), f"experts placed as {path} says"
    in_order = contiguous(layers, experts, layout.ep)
    if policy is PlacementPolicy.contiguous:
        return in_order, "experts placed in order"
    try:
        steps = read_steps(directory / "metrics.jsonl", TRACE_STEPS)
    except InputError as error:
        return in_order, f"experts placed in order ({error})"
    if any(len(count_LE) != layers or len(count_LE[0]) != experts for count_LE in steps):
        return in_order, "experts placed in order, for the run in the directory is of another model"
    # No process gets more experts than in order: that is what its memory was reckoned with.
    cluster = Cluster(layout.ep, min(layout.ep, _node_size(layout.world_size)), -(-experts // layout.ep))
    placement = balanced(summed(steps), cluster).placement
    return placement, f"experts placed by the counts of the last {len(steps)} logged steps"
