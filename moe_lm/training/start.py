"""How a run begins: with which weights, and which of them it trains."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initial_value


class Start(Protocol):
    """Where a run's weights come from; the same on every process."""

    trained_experts: Sequence[int] | None
    """Numbers of the experts that are trained in each layer; null means all."""
    state: dict[str, Any]
    """What a checkpoint says of it, JSON."""

    def adapt(self, model: CausalLM, compute_dtype: torch.dtype) -> None:
        """Add parameters to a model just built, and freeze those that are not trained; in place, before it is shared
        among processes.
        """

    def value(self, name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole of one parameter."""

    def is_saved(self, name: str) -> bool:
        """Whether checkpoints hold a parameter, trained or not."""


class FromSeed:
    """Random weights, all of them trained."""

    trained_experts = None

    def __init__(self, model: ModelConfig, seed: int):
        self._model, self._seed = model, seed
        self.state: dict[str, Any] = {}

    def adapt(self, model: CausalLM, compute_dtype: torch.dtype) -> None:
        """See `Start`."""

    def value(self, name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `initial_value`."""
        return initial_value(self._model, self._seed, name, shape, device, dtype)

    def is_saved(self, name: str) -> bool:
        """See `Start`."""
        return True
