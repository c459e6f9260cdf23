"""Adapters against peft: our file on transformers' model gives what our model gives."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.finetune.adapter import write_adapter
from moe_lm.finetune.base import choose_trained
from moe_lm.finetune.config import FinetuneConfig, Method
from moe_lm.finetune.lora import is_adapter
from moe_lm.hf.layout import to_hf_config
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.training.state import MODEL

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    "parts",
    [[], ["attention"], ["experts"], ["router"], ["embedding"], ["head"], ["embedding", "attention", "router", "head"]],
    ids=str,
)
@pytest.mark.parametrize("family", ["mixture", "dense"])
def test_an_adapter_gives_the_same_logits_under_peft(family, parts, tmp_path):
    """Catches experts' matrices in another order than peft's, a scale that differs, adapters that peft leaves out, and
    names that it does not know."""
    if family == "dense" and "router" in parts:
        parts = [part for part in parts if part != "router"] or ["experts"]
    config = ModelConfig(**SHAPE, family=ModelFamily[family], num_experts=4)
    finetune = FinetuneConfig(Method.lora, parts, rank=6, alpha=9.0)
    ours = CausalLM(config)
    choose_trained(ours, finetune)
    initialize(ours, seed=5)
    named = dict(ours.named_parameters())
    slices = [TensorSlice.whole(MODEL + name, value.detach()) for name, value in named.items() if is_adapter(name)]
    checkpoint = Checkpoint(CheckpointStore(tmp_path / "checkpoints", CheckpointConfig()).save(1, slices, {}))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", checkpoint, config, finetune, str(tmp_path / "base"))

    kind = "mixtral" if config.is_mixture else "mistral"
    from transformers import AutoConfig

    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **to_hf_config(config))).eval()
    base.load_state_dict({name: value for name, value in named.items() if not is_adapter(name)})
    tokens = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        untuned = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits
        mine = ours.logits(ours(tokens).hidden_BSD)
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (untuned - theirs).abs().max() > 1e-2 * theirs.abs().max()
