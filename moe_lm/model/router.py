"""The router: which experts each token goes to, with which weight, and the statistics that balancing needs.

Its output is a flat list of assignments rather than [T, K] tables, so that top-k, drops, soft gates and expert choice
are one interface for the dispatcher; and reduced statistics rather than logits, so that nothing of size [T, E] outlives
a layer.

Letters: T tokens, D hidden, E experts, K experts per token, R assignments (T·K here).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.model.config import ModelConfig


class Assignments(NamedTuple):
    """One entry per (token, expert) pair, in any order."""

    token_R: Tensor
    """Row of the token, int64."""
    expert_R: Tensor
    """Global number of the expert, int64."""
    weight_R: Tensor
    """Factor of the expert's output in the sum, in the compute type; carries the gradient to the router."""


class RoutingStatistics(NamedTuple):
    """Sums over the tokens that count (`routing_mask`), in fp32: they add over micro-batches and over processes."""

    probability_sum_E: Tensor
    """Σ softmax probability of each expert; differentiable."""
    count_E: Tensor
    """Number of assignments to each expert."""
    z_sum: Tensor
    """Σ logsumexp(logits)², scalar; differentiable."""
    dropped: Tensor
    """Number of assignments beyond the experts' capacity, those of uncounted tokens included; scalar."""
    drift_sum: Tensor
    """Σ KL(p_start ‖ p) from the starting router, scalar; differentiable, and 0 without one."""


def expert_capacity(factor: float, num_assignments: int, num_experts: int) -> int:
    """C: the most rows that one expert takes, `factor` even shares of the assignments, rounded up (GShard, Lepikhin et
    al. 2020, section 2.2).
    """
    return math.ceil(min(factor * num_assignments / num_experts, num_assignments))


class Router(nn.Module):
    """Mixtral's router: softmax over all experts in fp32, the K largest, renormalised to sum to one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.capacity_factor = config.capacity_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        starting = torch.zeros_like(self.weight.detach()) if config.router_drift_coef > 0 else None
        self.starting_weight: Tensor | None
        """The router that fine-tuning started with, which a penalty keeps this one near; null without the penalty."""
        self.register_buffer("starting_weight", starting, persistent=False)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, E] of hidden states, in fp32 at least: rounding a logit changes the choice itself, not only its
        weight. (fp64 stays fp64, for exact tests.)
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x_TD.to(wide), self.weight.to(wide))

    def choose(self, probability_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [T, K] and numbers of the experts that each token goes to."""
        return probability_TE.topk(self.top_k, dim=-1)

    def forward(
        self, x_TD: Tensor, routing_mask_T: Tensor | None, counted: bool = True
    ) -> tuple[Assignments, RoutingStatistics | None]:
        """Route T tokens. Those outside the mask are routed as well, but do not count in the statistics, if wanted."""
        logits_TE = self.logits(x_TD)
        probability_TE = logits_TE.softmax(dim=-1)
        top_TK, expert_TK = self.choose(probability_TE)
        weight_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
        token_TK = torch.arange(x_TD.shape[0], device=x_TD.device)[:, None].expand(-1, self.top_k)
        assignments = Assignments(token_TK.flatten(), expert_TK.flatten(), weight_TK.flatten().to(x_TD.dtype))
        if not counted:
            return assignments, None
        statistics = _statistics(logits_TE, probability_TE, expert_TK, routing_mask_T)
        if self.capacity_factor is not None:
            statistics = statistics._replace(dropped=_dropped(expert_TK, statistics.count_E, self.capacity_factor))
        if self.starting_weight is not None:
            with torch.no_grad():  # a target, as a teacher's
                starting_TE = F.linear(x_TD.to(logits_TE.dtype), self.starting_weight.to(logits_TE.dtype))
            statistics = statistics._replace(drift_sum=_drift_sum(starting_TE, logits_TE, routing_mask_T))
        return assignments, statistics


def _dropped(expert_TK: Tensor, count_E: Tensor, factor: float) -> Tensor:
    """How many assignments are beyond the experts' capacity, padding included."""
    capacity = expert_capacity(factor, expert_TK.numel(), len(count_E))
    every_E = torch.zeros_like(count_E).scatter_add(
        0, expert_TK.flatten(), torch.ones_like(expert_TK, dtype=count_E.dtype).flatten()
    )
    return (every_E - capacity).clamp(min=0).sum()


def _drift_sum(starting_TE: Tensor, logits_TE: Tensor, routing_mask_T: Tensor | None) -> Tensor:
    """Σ over tokens that count of KL(softmax(starting) ‖ softmax(logits))."""
    log_start_TE, log_now_TE = starting_TE.log_softmax(dim=-1), logits_TE.log_softmax(dim=-1)
    drift_T = (log_start_TE.exp() * (log_start_TE - log_now_TE)).sum(dim=-1)
    return drift_T.sum() if routing_mask_T is None else (drift_T * routing_mask_T).sum()


def _statistics(
    logits_TE: Tensor, probability_TE: Tensor, expert_TK: Tensor, routing_mask_T: Tensor | None
) -> RoutingStatistics:
    z_T = logits_TE.logsumexp(dim=-1).square()
    ones_TK = torch.ones_like(expert_TK, dtype=logits_TE.dtype)
    if routing_mask_T is not None:
        counted_T = routing_mask_T.to(logits_TE.dtype)
        probability_TE = probability_TE * counted_T[:, None]
        z_T = z_T * counted_T
        ones_TK = ones_TK * counted_T[:, None]
    count_E = torch.zeros_like(logits_TE[0]).scatter_add(0, expert_TK.flatten(), ones_TK.flatten())
    none = count_E.new_zeros(())
    return RoutingStatistics(probability_TE.sum(dim=0), count_E.detach(), z_T.sum(), none, none)
