"""Losses that keep the router balanced: pure functions of reduced statistics.

All take sums over tokens, so that micro-batches and processes add up: with the load f given, the load-balancing loss is
linear in the probability sums. Training therefore takes f from the step before (counts of the whole global batch): the
gradient is then the same however the batch is cut up, where a load measured within each micro-batch would balance each
micro-batch by itself.

Letters: L layers, E experts, K experts per token.
"""

import torch
from torch import Tensor

from moe_lm.model.config import LoadBalancing


def load_fraction(count_LE: Tensor) -> Tensor:
    """f: each expert's share of its layer's assignments, [L, E], rows sum to 1; uniform for a layer without any."""
    total_L1 = count_LE.sum(dim=-1, keepdim=True)
    uniform = torch.full_like(count_LE, 1.0 / count_LE.shape[-1])
    return torch.where(total_L1 > 0, count_LE / total_L1.clamp(min=1), uniform)


def load_balancing_loss(
    probability_sum_LE: Tensor, load_LE: Tensor, num_tokens: Tensor | float, top_k: int, formula: LoadBalancing
) -> Tensor:
    """Load-balancing loss of a batch or of a part of one.

    `per_layer`: mean over layers of E · Σ_e f_e · P_e (Switch Transformer, Fedus et al. 2021, eq. 4, with f divided by
    K as Megatron does): 1 at balance. `pooled`: K · E · Σ_e mean_l f · mean_l P, as transformers' Mixtral computes it:
    K at balance; pooling layers before the product hides imbalances that cancel across layers.

    Args:
        probability_sum_LE: Σ over this part's tokens of the router's probabilities.
        load_LE: each expert's share of its layer's assignments (`load_fraction`), a constant.
        num_tokens: routed tokens of the whole batch; parts of one batch given the same number add up to its loss.
        top_k: K.
        formula: `per_layer` or `pooled`.
    """
    probability_LE = probability_sum_LE / num_tokens
    num_experts = probability_LE.shape[-1]
    if formula is LoadBalancing.pooled:
        return top_k * num_experts * (load_LE.mean(dim=0) * probability_LE.mean(dim=0)).sum()
    return num_experts * (load_LE * probability_LE).sum(dim=-1).mean()


def router_z_loss(z_sum_L: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over layers and tokens of logsumexp(logits)² (ST-MoE, Zoph et al. 2022, eq. 5); parts add up as above."""
    return z_sum_L.mean() / num_tokens


def router_drift_loss(drift_sum_L: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over layers and tokens of KL(p_start ‖ p), in nats; parts add up as above.

    The divergence that distillation takes (Hinton et al. 2015), between the router that fine-tuning started with and
    the present one, both on the present hidden states.
    """
    return drift_sum_L.mean() / num_tokens


def load_violation(count_LE: Tensor) -> Tensor:
    """MaxVio per layer, [L]: how far the busiest expert is above the mean load; 0 at balance, E − 1 at collapse.

    From "Auxiliary-Loss-Free Load Balancing" (Wang et al. 2024), section 4.1.
    """
    mean_L = count_LE.mean(dim=-1).clamp(min=torch.finfo(count_LE.dtype).tiny)
    return count_LE.amax(dim=-1) / mean_L - 1
