"""The mixture-of-experts feed-forward block, as in Mixtral of Experts (Jiang et al. 2024, section 2.1), and its dense
sibling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.kernels.experts import expert_mixture
from moe_lm.kernels.grouping import Grouping
from moe_lm.model.config import ModelConfig
from moe_lm.model.dispatch import CapacityDispatcher, LocalDispatcher, TokenDispatcher
from moe_lm.model.linear import Linear
from moe_lm.model.router import Router, RoutingStatistics


class Experts(nn.Module):
    """E SwiGLU blocks in two stacked tensors, laid out as transformers' Mixtral in memory."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, size))

    def forward(self, x_TD: Tensor, grouping: Grouping) -> Tensor:
        """The weighted sum, for each token, of the experts that take it; [T, D] to [T, D]."""
        return expert_mixture(x_TD, grouping, self.gate_up_proj, self.down_proj)


class MixtureOfExperts(nn.Module):
    """Route, dispatch, experts, combine."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.dispatcher: TokenDispatcher = LocalDispatcher(config.num_experts)
        if config.capacity_factor is not None:
            self.dispatcher = CapacityDispatcher(config.num_experts, config.capacity_factor)

    def forward(
        self, x_BSD: Tensor, routing_mask_BS: Tensor | None, counted: bool = True
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """X [B, S, D] to [B, S, D]; if counted, with routing statistics over the tokens of the mask (null: all)."""
        x_TD = x_BSD.flatten(0, 1)
        mask_T = None if routing_mask_BS is None else routing_mask_BS.flatten()
        assignments, statistics = self.gate(x_TD, mask_T, counted)
        x_ND, grouping, handle = self.dispatcher.dispatch(x_TD, assignments)
        y_TD = self.dispatcher.combine(self.experts(x_ND, grouping), handle)
        return y_TD.view_as(x_BSD), statistics


class DenseFeedForward(nn.Module):
    """Mistral's SwiGLU: the baseline that mixtures are compared with, and what upcycling starts from."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BSD: Tensor, routing_mask_BS: Tensor | None, counted: bool = True) -> tuple[Tensor, None]:
        """X [B, S, D] to [B, S, D]; nothing is routed, so there are no statistics."""
        return self.down_proj(F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD)), None
