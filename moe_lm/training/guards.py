"""Guards against steps that would harm the weights: losses that leap, and what to say of figures that are not finite.

A loss is a spike by its robust z-score: the distance from the window's median in units of 1.4826 times the median
absolute deviation, which is the standard deviation of a normal distribution but is not moved by a few outliers
(Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers"). Losses are those of the global batch, the same on
every process, so that all decide alike.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.data.batch import Batch
from moe_lm.errors import RunError
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.config import GuardsConfig
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel
from moe_lm.training.progress import Progress
from moe_lm.training.step import StepResult

MINIMUM = 32
"""Losses that must be known before one can be a spike."""


class SpikeDetector:
    """The losses of the last steps that were learned from, and what they say about the next."""

    def __init__(self, config: GuardsConfig, losses: Iterable[float] = ()):
        self._threshold = config.spike_threshold
        self._losses = deque(losses, maxlen=config.spike_window)

    @property
    def losses(self) -> list[float]:
        """The window, oldest first: all the state there is."""
        return list(self._losses)

    def limit(self) -> float:
        """The loss above which the next one is a spike; infinite while too few are known."""
        if len(self._losses) < MINIMUM:
            return math.inf
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        # Where a loss hardly varies, as at the end of a decay, ordinary noise would be many deviations.
        return median + self._threshold * max(deviation, 0.01 * abs(median))

    def add(self, loss: float) -> None:
        """Take in a loss that was learned from."""
        self._losses.append(loss)


def skipped_too_often(
    compute: ComputeModel,
    optimizer: Optimizer,
    runtime: Runtime,
    progress: Progress,
    batch: GlobalBatch,
    result: StepResult,
) -> RunError:
    """The end of a run after too many skipped updates, to be raised, with what is found out about the last of them.

    Every process must call it.

    Args:
        compute: See `diagnose`.
        optimizer: The same.
        runtime: This process among its peers.
        progress: How many updates were skipped, and where the run stands.
        batch: What the last step was to learn from.
        result: What came of it.
    """
    causes = runtime.gather(diagnose(compute, optimizer, batch.micro_batches, runtime.device))
    by_process = "".join(f"; process {rank}: {cause}" for rank, cause in enumerate(causes))
    where = f"; {causes[0]}" if len(set(causes)) == 1 else by_process
    return runtime.failed_everywhere(
        RunError(
            f"{progress.skipped_in_a_row} updates in a row were skipped, the last at step {progress.step}, with "
            f"loss {result.cross_entropy:.4g} and gradient norm {result.gradient_norm:.4g}{where}. Lower "
            "optimizer.learning_rate, lengthen schedule.warmup_steps, or try trainer.precision=fp32; no weight was "
            "changed by them."
        )
    )


def diagnose(compute: ComputeModel, optimizer: Optimizer, batches: list[Batch], device: torch.device) -> str:
    """Where something that is not finite comes from: weights, else activations, else gradients of the last step.

    Every process must call it; it says what this one has found.

    Args:
        compute: The model; its weights are those that the step began with, since it was skipped.
        optimizer: Knows the parameters with their gradients.
        batches: This process's micro-batches of that step.
        device: Where to compute.
    """
    # All of it, whatever is found: forward passes of a sharded model need every process.
    outputs = [_first_module(compute.module, batch.to(device)) for batch in batches]
    compute.parallel.release()
    if weights := [shard.name for shard in optimizer.shards if not shard.value.isfinite().all()]:
        return f"the weights themselves are not finite: {_some(weights)}"
    for number, name in enumerate(outputs):
        if name is not None:
            return f"of micro-batch {number}, the output of {name} is the first that is not finite"
    gradients = [s.name for s in optimizer.shards if s.gradient is not None and not s.gradient.isfinite().all()]
    if gradients:
        # Backward runs from the last layer to the first: it met the last of them first.
        last = gradients[-1]
        return (
            f"weights and activations are finite; the gradient of {last} is the first that is not ({_some(gradients)})"
        )
    return "weights, activations and gradients are finite; the loss or the norm is not, or the loss is a spike"


@torch.no_grad()
def _first_module(model: nn.Module, batch: Batch) -> str | None:
    """Name of the module whose output is the first with a value that is not finite, in order of execution."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(t.isfinite().all() for t in _tensors(output) if t.is_floating_point()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(batch.input_ids, batch.position_ids, batch.document_ids, batch.routing_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
