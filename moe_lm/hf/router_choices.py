"""Which experts a model's routers choose, and for which tokens another choice would be as right.

Where two logits are within rounding of each other, two right programs may choose differently, and then differ by more
than rounding in what follows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.model.decoder import CausalLM
from moe_lm.model.router import Router

MARGIN = 1e-5
"""Two logits of a router that are closer than this share of the largest are within rounding of each other. Equal ones
are not: both sides then take the same."""


class RouterChoices:
    """While its block runs, notes the choices of a model's routers."""

    def __init__(self, model: CausalLM):
        """Find the routers.

        Args:
            model: Runs once in the block.
        """
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._tied: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def __enter__(self) -> "RouterChoices":
        self._handles = [router.register_forward_pre_hook(self._note) for router in self._routers]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, router: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(router, Router)
        logits_TE = router.logits(arguments[0])
        if router.top_k == logits_TE.shape[-1]:
            return
        best_TK, expert_TK = logits_TE.topk(router.top_k + 1, dim=-1)
        margin_T = best_TK[:, -2] - best_TK[:, -1]
        self._tied.append((margin_T > 0) & (margin_T < MARGIN * logits_TE.abs().amax(dim=-1)))
        self._chosen.append(expert_TK[:, :-1].sort(dim=-1).values)

    def clear(self, tokens_BS: Tensor) -> Tensor:
        """Which tokens are not tied in any layer, [B, S]."""
        if not self._tied:
            return torch.ones_like(tokens_BS, dtype=torch.bool)
        return ~torch.stack(self._tied).any(dim=0).view_as(tokens_BS)

    def same(self, other: "RouterChoices", tokens_BS: Tensor) -> Tensor:
        """Which tokens have the same experts in every layer of another run, [B, S]."""
        if not self._chosen:
            return torch.ones_like(tokens_BS, dtype=torch.bool)
        chosen_TK, other_TK = (torch.cat(run._chosen, dim=-1) for run in (self, other))
        return (chosen_TK == other_TK).all(dim=-1).view_as(tokens_BS)
