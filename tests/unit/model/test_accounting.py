"""What the formulas of memory say, against what autograd keeps."""

import dataclasses

import pytest
import torch

from moe_lm.kernels import native
from moe_lm.model.accounting import activation_bytes
from moe_lm.model.config import ModelConfig, ModelFamily, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts=4,
)
TOKENS = torch.randint(50, (8, 128), generator=torch.Generator().manual_seed(2))


def _kept(config: ModelConfig, dtype: torch.dtype, document_ids: torch.Tensor | None) -> int:
    """Bytes that the layers of a forward pass keep for its backward pass, each storage once."""
    model = CausalLM(config)
    initialize(model, 0)
    model.to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(TOKENS, document_ids_BS=document_ids)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_value_heads", [2, 1])
@pytest.mark.parametrize("family", ModelFamily)
@pytest.mark.parametrize("dtype, tiles", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_layer_keeps_what_the_formula_says(dtype, tiles, family, key_value_heads, masked, monkeypatch):
    """Catches an operator that keeps more than its inputs: a copy, or a product that is needed for its shape alone."""
    if tiles and not native.has_amx():
        pytest.skip("no AMX tiles here")
    monkeypatch.setattr(native, "has_amx", lambda: tiles)
    one = dataclasses.replace(CONFIG, family=family, num_key_value_heads=key_value_heads)
    two = dataclasses.replace(one, num_hidden_layers=2)
    documents = (torch.arange(128) // 50).expand(8, 128) if masked else None
    # What is outside of layers, such as angles, is in both.
    of_layer = _kept(two, dtype, documents) - _kept(one, dtype, documents)
    explicit = dtype is torch.bfloat16 and not tiles
    probabilities = 128 if explicit else 0  # one block of queries sees all keys
    keys = 128 if masked and dtype is torch.float32 and native.library() is None else 0
    expected = activation_bytes(one, TOKENS.numel(), Recompute.none, dtype.itemsize, probabilities, keys)
    assert 0.97 < of_layer / expected < 1.08


def test_recomputation_keeps_less():
    """Catches modes that are swapped."""
    many = dataclasses.replace(CONFIG, num_hidden_layers=32)
    none, selective, full = (activation_bytes(many, 1024, mode, 2, 128) for mode in Recompute)
    assert none > 1.3 * selective and selective > 3 * full
