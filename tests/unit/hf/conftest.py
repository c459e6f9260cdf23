"""Shared by the tests of Hugging Face directories: small models, a tokenizer of twenty ids, and their export."""

from pathlib import Path

import pytest
import torch

from moe_lm.hf.export import export
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from tests.models import InMemory, randomize, write_tokenizer

SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5e4,
    "initializer_range": 0.3,
}
CONFIGS = {
    "mixture": ModelConfig(**SHAPE, num_experts=3, num_experts_per_tok=2, rms_norm_eps=1e-4),
    "tied": ModelConfig(**SHAPE, num_experts=3, num_experts_per_tok=1, tie_word_embeddings=True, sliding_window=5),
    "dense": ModelConfig(**SHAPE, family=ModelFamily.dense, head_dim=6),
}


class Exporter:
    """Exports the models of `CONFIGS`, always with the same weights."""

    def __init__(self, directory: Path):
        self.output = directory / "place" / "hf"
        self.output.parent.mkdir()
        self.tokenizer = write_tokenizer(directory / "tokenizer")

    def __call__(
        self, family: str = "mixture", dtype: torch.dtype = torch.float32, tensors=None, max_shard_bytes: int = 10**9
    ) -> CausalLM:
        """Export to `output`; the model that was exported."""
        source = InMemory(make_model(family))
        if tensors is not None:
            source.parameters = lambda: tensors
        export(source, self.tokenizer, self.output, dtype, lambda receipt: receipt.line(), max_shard_bytes)
        return source.model


def make_model(family: str) -> CausalLM:
    """A model with random weights, norms included."""
    model = CausalLM(CONFIGS[family])
    initialize(model, seed=5)
    return randomize(model, seed=6)


@pytest.fixture
def exporter(tmp_path: Path) -> Exporter:
    return Exporter(tmp_path)
