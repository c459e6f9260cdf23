"""The forward pass of a model on disk: that of the whole model, with one layer of it in memory."""

import pytest
import torch

from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.model.streamed import streamed_logits
from tests.models import InMemory

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-3,
    "rope_theta": 1e4,
}
CONFIGS = {
    "window": ModelConfig(**SHAPE, family=ModelFamily.dense, sliding_window=9),
    "tied": ModelConfig(**SHAPE, family=ModelFamily.dense, tie_word_embeddings=True, head_dim=10),
    "mixture": ModelConfig(**SHAPE, num_experts=3, num_experts_per_tok=2),
}
TOKENS = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(1))


def _base(config: ModelConfig, dtype: torch.dtype = torch.float32) -> InMemory:
    model = CausalLM(config)
    initialize(model, seed=3)
    return InMemory(model.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_whole_model(name):
    """Catches a window, a tied head, a norm or a rotary base that is left out."""
    source = _base(CONFIGS[name])
    expected = source.model.logits(source.model(TOKENS).hidden_BSD)
    assert torch.allclose(streamed_logits(source, TOKENS), expected, rtol=1e-6, atol=1e-6)


def test_weights_in_bf16_are_computed_in_fp32():
    """Catches a comparison that is drowned in the rounding of bf16."""
    source = _base(CONFIGS["mixture"], torch.bfloat16)
    logits = streamed_logits(source, TOKENS)
    whole = source.model.float()
    with torch.no_grad():
        expected = whole.logits(whole(TOKENS).hidden_BSD)
    assert logits.dtype is torch.float32 and torch.allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_layers_are_read_one_after_another(monkeypatch):
    """Catches a model that is read whole: all parameters are asked for once, in the order of the layers."""
    source = _base(CONFIGS["mixture"])
    read: list[str] = []
    original = source.tensor
    monkeypatch.setattr(source, "tensor", lambda name: read.append(name) or original(name))
    streamed_logits(source, TOKENS)
    assert sorted(read) == sorted(source.names())
    layers = [name.split(".")[2] for name in read if ".layers." in name]
    assert layers == sorted(layers)
