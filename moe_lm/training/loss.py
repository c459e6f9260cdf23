"""The training loss of one micro-batch: its share of the global batch's loss, so that shares simply add.

Every term is a sum over this micro-batch's tokens divided by the number of tokens of the *global* batch. Accumulated
over micro-batches and summed over processes, gradients are those of the undivided batch, up to rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.data.batch import Batch
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.balancing import load_balancing_loss, load_fraction, router_drift_loss, router_z_loss
from moe_lm.model.config import LoadBalancing, LoadSource
from moe_lm.model.decoder import CausalLM
from moe_lm.parallel.runtime import Runtime


class LossShares(NamedTuple):
    """One micro-batch's shares of the global batch's losses."""

    total: Tensor
    """What backward runs on."""
    cross_entropy: Tensor
    """Mean negative log-likelihood per target, in nats."""
    load_balancing: Tensor
    """Load-balancing loss, before its coefficient."""
    router_z: Tensor
    """Router z-loss, before its coefficient."""
    router_drift: Tensor
    """Drift from the starting router, before its coefficient."""
    dropped: Tensor
    """Assignments beyond the experts' capacity, over all layers."""
    count_LE: Tensor
    """Assignments to each expert of each layer; [0, 1] for a dense model."""


def loss_shares(
    model: CausalLM, batch: Batch, num_targets: int, num_routed_tokens: int, load_LE: Tensor, runtime: Runtime
) -> LossShares:
    """Run the model on a micro-batch.

    Args:
        model: the (compute copy of the) model.
        batch: this micro-batch.
        num_targets: targets of the global batch.
        num_routed_tokens: tokens of the global batch that count in routing.
        load_LE: each expert's share of its layer's assignments in the step before (see `model/balancing.py`).
        runtime: this process among its peers.
    """
    config = model.config
    output = model(batch.input_ids, batch.position_ids, batch.document_ids, batch.routing_mask)
    hidden_TD, head_VD = model.lm_head.factors(output.hidden_BSD.flatten(0, 1))
    nll = linear_cross_entropy(hidden_TD, head_VD, batch.labels.flatten())
    cross_entropy = nll / num_targets
    statistics = output.statistics
    if statistics is None:
        zero = torch.zeros_like(cross_entropy)
        return LossShares(cross_entropy, cross_entropy.detach(), zero, zero, zero, zero, load_LE)
    balancing = torch.zeros_like(cross_entropy)
    if config.load_balancing is not LoadBalancing.none:
        if config.load_balancing_source is LoadSource.micro_batch:
            count_LE = statistics.count_E.clone()
            runtime.sum([count_LE])
            load_LE = load_fraction(count_LE)
        balancing = load_balancing_loss(
            statistics.probability_sum_E, load_LE, num_routed_tokens, config.num_experts_per_tok, config.load_balancing
        )
    z = router_z_loss(statistics.z_sum, num_routed_tokens)
    total = cross_entropy + config.router_aux_loss_coef * balancing + config.router_z_loss_coef * z
    drift = router_drift_loss(statistics.drift_sum, num_routed_tokens)
    if config.router_drift_coef > 0:
        total = total + config.router_drift_coef * drift
    return LossShares(
        total,
        cross_entropy.detach(),
        balancing.detach(),
        z.detach(),
        drift.detach(),
        statistics.dropped.sum(),
        statistics.count_E,
    )
