"""What a checkpoint of a run says: its tensors, its state, and whether they are those of a run at all."""

import hashlib
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.store import TensorSlice, named_step
from moe_lm.checkpoint.tensor_file import CheckpointError, TensorKind, are_sizes
from moe_lm.kernels import native
from moe_lm.model.balancing import load_fraction
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.parallel.parallelize import ParallelModel
from moe_lm.parallel.runtime import Runtime
from moe_lm.parallel.shards import ParameterShard, whole_shards
from moe_lm.training.config import OptimizerConfig
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.progress import Progress

MODEL, OPTIMIZER, LOAD = "model/", "optimizer/", "balancing/load"
"""Prefixes and names of a checkpoint's tensors."""


_STATE = {
    "progress": dict,
    "losses": list,
    "environment": dict,
    "corpus_fingerprint": str,
    "tokenizer_fingerprint": str,
    "config": dict,
    "data": dict,
}
"""What a checkpoint's state must say, and its type."""


def initial_load(config: ModelConfig) -> Tensor:
    """Uniform load [L, E] of a mixture; [0, 1] for a dense model, which balances nothing."""
    return load_fraction(
        torch.zeros(config.num_hidden_layers, config.num_experts) if config.is_mixture else torch.zeros(0, 1)
    )


def expected_tensors(model: ModelConfig, optimizer: Optimizer, trained: bool) -> dict[str, TensorKind]:
    """Name, type and global shape of every tensor of a checkpoint; before the first update there are no moments."""
    kinds = {MODEL + shard.name: TensorKind(shard.value.dtype, shard.shape) for shard in optimizer.shards}
    if trained:
        kinds |= {OPTIMIZER + name: kind for name, kind in optimizer.state_kinds().items()}
    return kinds | {LOAD: TensorKind.of(initial_load(model))}


def saved_slices(optimizer: Optimizer, load_LE: Tensor, is_main: bool) -> Iterator[TensorSlice]:
    """This process's part of a checkpoint; those of all processes hold every value once."""
    counting = {shard.name for shard in optimizer.shards if shard.counts}
    for shard in optimizer.shards:
        if shard.name in counting:
            yield from _boxes(MODEL + shard.name, shard, shard.value)
    for shard, key, value in optimizer.state_tensors():
        name = f"{OPTIMIZER}{shard.name}/{key}"
        if value.dim() and shard.name in counting:
            yield from _boxes(name, shard, value)
        elif not value.dim() and is_main:  # a count of updates, the same everywhere
            yield TensorSlice.whole(name, value)
    if is_main:
        yield TensorSlice.whole(LOAD, load_LE)


def _boxes(name: str, shard: ParameterShard, local: Tensor) -> Iterator[TensorSlice]:
    return (TensorSlice(name, box.of(local), shard.shape, box.offsets) for box in shard.boxes)


@torch.no_grad()
def load_tensors(checkpoint: Checkpoint, optimizer: Optimizer, load_LE: Tensor, trained: bool) -> None:
    """Read this process's part of a checkpoint, whoever wrote which part of it, in place.

    Args:
        checkpoint: Has the `expected_tensors`.
        optimizer: Its shards' values are weights.
        load_LE: The load that balances the next step.
        trained: Whether there are moments.
    """
    for shard in optimizer.shards:
        _read(checkpoint, MODEL + shard.name, shard, shard.value)
    kinds = checkpoint.kinds(OPTIMIZER)

    def state(shard: ParameterShard, key: str) -> Tensor:
        name = f"{OPTIMIZER}{shard.name}/{key}"
        if not kinds[name].shape:
            return checkpoint.tensor(name)
        local = torch.empty_like(shard.value)
        _read(checkpoint, name, shard, local)
        return local

    optimizer.restore_state(state if trained else None)
    load_LE.copy_(checkpoint.tensor(LOAD))


def _read(checkpoint: Checkpoint, name: str, shard: ParameterShard, local: Tensor) -> None:
    for box in shard.boxes:
        box.of(local).copy_(checkpoint.box(name, box.offsets, box.lengths))


def check_state(
    checkpoint: Checkpoint, model: CausalLM, optimizer: OptimizerConfig, is_saved: Callable[[str], bool]
) -> None:
    """Compare a checkpoint with what a run of this configuration saves; nothing is loaded.

    Args:
        checkpoint: To be compared.
        model: On the meta device, trained in the parts that the run trains.
        optimizer: The run's.
        is_saved: Whether its checkpoints hold the parameter of a name.

    Raises:
        CheckpointError: Tensors are missing, too many, or of another type or shape, or the progress is unreadable.
    """
    progress = progress_of(checkpoint)
    shards = [shard for shard in whole_shards(model) if is_saved(shard.name)]
    checkpoint.expect(expected_tensors(model.config, Optimizer(shards, optimizer), progress.updates > 0))


def progress_of(checkpoint: Checkpoint) -> Progress:
    """The progress that a checkpoint was made at, if its state is that of a run."""
    for name, kind in _STATE.items():
        if not isinstance(checkpoint.state.get(name), kind):
            raise CheckpointError(f"state.json: has no {name} of a run")
    try:
        progress = Progress(**checkpoint.state["progress"])
        counts = [progress.step, progress.data_step, progress.updates, *progress.skipped_data_steps]
    except TypeError as error:
        raise CheckpointError(f"state.json: says no valid progress of a run ({error})") from error
    if not are_sizes(counts):
        raise CheckpointError("state.json: the progress of a run is counted in whole numbers")
    if named_step(checkpoint.path) not in (None, progress.step):
        raise CheckpointError(f"was saved at step {progress.step}, whatever its name says")
    return progress


def environment(runtime: Runtime, parallel: ParallelModel, dtype: torch.dtype) -> dict[str, Any]:
    """What a bit-exact resume depends on besides the configuration, for a run that computes in `dtype`."""
    owners = () if parallel.placement is None else parallel.placement.owners
    placed = hashlib.sha256(repr(owners).encode()).hexdigest()[:8] if owners else "none"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("moe-lm", "torch", "transformers", "accelerate")},
        "device": runtime.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.described(runtime.device, dtype),
        "threads": torch.get_num_threads(),
        "processes": runtime.world_size,
        **({"layout": str(parallel.layout), "owners": placed} if runtime.world_size > 1 else {}),
    }
