"""What a trained model on disk is to whoever reads it, whatever the format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moe_lm.model.config import ModelConfig


class ModelSource(Protocol):
    """A model on disk, whose parameters are read one at a time, so that memory need not hold the model."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def config(self) -> ModelConfig:
        """What it is made of."""

    @property
    def tokenizer_directory(self) -> Path | None:
        """Directory of the tokenizer's files; null where there are none."""

    def names(self) -> list[str]:
        """Native names of all parameters, in the model's own order; a tied output head is none."""

    def tensor(self, name: str) -> Tensor:
        """A whole parameter, on the CPU, in the type it is stored in."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters by name, in the model's own order, read one at a time."""
