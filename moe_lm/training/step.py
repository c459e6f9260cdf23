"""One optimizer step: micro-batches, sum over processes, norm, update.

Everything a step would change besides weights and moments (the load that balances the next step) is returned, and
committed only together with the update: a step that is skipped changes nothing.
"""

import dataclasses
import math

import torch
from torch import Tensor

from moe_lm.model.balancing import load_fraction
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.feed import GlobalBatch
from moe_lm.training.loss import loss_shares
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel
from moe_lm.transfer import copied_to


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every process."""

    cross_entropy: float
    """Mean negative log-likelihood per target of the global batch, in nats."""
    load_balancing: float
    router_z: float
    router_drift: float
    gradient_norm: float
    """Before clipping."""
    dropped: int
    """Assignments beyond the experts' capacity, over all layers and processes."""
    count_LE: Tensor
    """Assignments of the global batch to each expert of each layer, on the CPU."""
    finite: bool
    """Whether loss and gradient are."""
    applied: bool
    """False when they are not, or the loss is above its limit: nothing was changed."""


def train_step(
    compute: ComputeModel,
    optimizer: Optimizer,
    runtime: Runtime,
    batch: GlobalBatch,
    load_LE: Tensor,
    factor: float,
    loss_limit: float = math.inf,
) -> StepResult:
    """Run one step on this process's micro-batches of the global batch.

    Args:
        compute: the compute copy and its master weights.
        optimizer: the update rules of the master weights.
        runtime: this process among its peers.
        batch: micro-batches of this process, and the token counts of the global batch.
        load_LE: the load of the step before, for the load-balancing loss.
        factor: learning rate as a factor of its peak.
        loss_limit: a cross-entropy above it is not learned from.
    """
    optimizer.zero_grad()
    figures = torch.zeros(5, device=runtime.device)
    count_LE = torch.zeros_like(load_LE)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        micro_batch = micro_batch.to(runtime.device)
        shares = loss_shares(compute.module, micro_batch, batch.num_targets, batch.num_routed_tokens, load_LE, runtime)
        compute.parallel.begin_backward(last=number == len(batch.micro_batches))
        shares.total.backward()
        of_micro_batch = (
            shares.cross_entropy,
            shares.load_balancing,
            shares.router_z,
            shares.router_drift,
            shares.dropped,
        )
        figures += torch.stack(of_micro_batch)
        count_LE += shares.count_LE
    sharded = compute.parallel.layout.sharded
    unsummed = [] if sharded else optimizer.gradients()  # FSDP2 has summed what it shards
    runtime.sum([*unsummed, figures, count_LE])
    optimizer.drop_frozen_gradients()
    norm = optimizer.gradient_norm(runtime if sharded else None)
    on_host = torch.cat((figures, norm[None], count_LE.flatten())).cpu()  # the step's only wait for a GPU
    cross_entropy, load_balancing, router_z, router_drift, dropped, gradient_norm = on_host[:6].tolist()
    finite = math.isfinite(gradient_norm) and math.isfinite(cross_entropy)
    applied = finite and cross_entropy <= loss_limit
    if applied:
        optimizer.step(gradient_norm, factor)
        compute.refresh()
    losses = cross_entropy, load_balancing, router_z, router_drift
    return StepResult(*losses, gradient_norm, int(dropped), on_host[6:].view(count_LE.shape), finite, applied)


def next_load(result: StepResult, load_LE: Tensor) -> Tensor:
    """The load to balance the next step by: this step's, or the old one if the step was skipped."""
    if not result.applied:
        return load_LE
    return copied_to(load_fraction(result.count_LE).to(load_LE.dtype), load_LE.device)
