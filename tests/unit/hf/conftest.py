"""Shared by the tests of Hugging Face directories: small models, a stand-in for tokenizer files, and their export."""

from pathlib import Path

import pytest
import torch

from moe_lm.hf.export import export
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

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
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


class Exporter:
    """Exports the models of `CONFIGS`, always with the same weights."""

    def __init__(self, directory: Path):
        self.output = directory / "hf"

    def __call__(self, family: str = "mixture", dtype: torch.dtype = torch.float32, tensors=None) -> CausalLM:
        """Export to `output`; the model that was exported."""
        model = make_model(family)
        parameters = model.named_parameters() if tensors is None else tensors
        export(model.config, parameters, self._write_tokenizer, TOKEN_IDS, self.output, dtype)
        return model

    @staticmethod
    def _write_tokenizer(directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(b"not read by the export")


def make_model(family: str) -> CausalLM:
    """A model with random weights, norms included."""
    model = CausalLM(CONFIGS[family])
    initialize(model, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1, generator=generator)
    return model


@pytest.fixture
def exporter(tmp_path: Path) -> Exporter:
    return Exporter(tmp_path)
