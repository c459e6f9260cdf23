"""How a run begins: with which weights, and which of them it trains."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lm.model.accounting import count_parameters, training_state_bytes
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initial_value
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.placement import Placement


class Start(Protocol):
    """Where a run's weights come from; the same on every process."""

    trained_experts: Sequence[int] | None
    """Numbers of the experts that are trained in each layer; null means all."""
    state: dict[str, Any]
    """What a checkpoint says of it, JSON."""
    has_learned: bool
    """Whether the weights are worth a validation before the first step."""

    def adapt(self, model: CausalLM, compute_dtype: torch.dtype) -> None:
        """Add parameters to a model just built, and freeze those that are not trained; in place, before it is shared
        among processes.
        """

    def value(self, name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole of one parameter."""

    def is_saved(self, name: str) -> bool:
        """Whether checkpoints hold a parameter, trained or not."""

    def check_layout(self, layout: Layout, placement: Placement | None) -> None:
        """Refuse a layout that what `adapt` adds can not be cut by."""

    def state_bytes(self, moments: int, compute_bytes: int) -> tuple[int, int]:
        """What training holds of the whole model at least, and what a save copies of that.

        Args:
            moments: Numbers per trained parameter that the optimizer keeps.
            compute_bytes: Size of a number of the compute copy.
        """

    def said(self) -> str:
        """What is trained, in a line for the user; empty where there is nothing to say."""


class FromSeed:
    """Random weights, all of them trained."""

    def __init__(self, model: ModelConfig, seed: int):
        self._model, self._seed = model, seed
        self.trained_experts: Sequence[int] | None = None
        self.has_learned = False
        self.state: dict[str, Any] = {}

    def adapt(self, model: CausalLM, compute_dtype: torch.dtype) -> None:
        """See `Start`."""

    def value(self, name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `initial_value`."""
        return initial_value(self._model, self._seed, name, shape, device, dtype)

    def is_saved(self, name: str) -> bool:
        """See `Start`."""
        return True

    def check_layout(self, layout: Layout, placement: Placement | None) -> None:
        """See `Start`."""

    def state_bytes(self, moments: int, compute_bytes: int) -> tuple[int, int]:
        """See `Start`."""
        copied = 4 * (1 + moments) * count_parameters(self._model).total
        return training_state_bytes(self._model, moments, compute_bytes), copied

    def said(self) -> str:
        """See `Start`."""
        return ""
