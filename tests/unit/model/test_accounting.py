"""What the formulas of memory say, against what autograd keeps."""

import dataclasses

import pytest
import torch

from moe_lm.kernels import native
from moe_lm.model.accounting import activation_bytes, training_state_bytes
from moe_lm.model.config import ModelConfig, ModelFamily, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.parallelize import ParallelModel
from moe_lm.parallel.shards import whole_shards
from moe_lm.training.config import OptimizerConfig, OptimizerName
from moe_lm.training.optimizer import Optimizer
from moe_lm.training.precision import ComputeModel

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


def _kept(
    config: ModelConfig,
    dtype: torch.dtype,
    document_ids: torch.Tensor | None = None,
    recompute: Recompute = Recompute.none,
) -> int:
    """Bytes that the layers of a forward pass keep for its backward pass, each storage once."""
    model = CausalLM(config)
    initialize(model, 0)
    model.to(dtype)
    model.model.recompute = recompute
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_computed_again_keeps_its_input(dtype):
    """Catches a formula of `full` that is off: a layer then keeps what comes into it, and nothing else."""
    two = dataclasses.replace(CONFIG, num_hidden_layers=2)
    of_layer = _kept(two, dtype, None, Recompute.full) - _kept(CONFIG, dtype, None, Recompute.full)
    assert of_layer == TOKENS.numel() * CONFIG.hidden_size * dtype.itemsize
    tokens = 1 << 20  # so many that one layer's own, which are there while it is computed again, can be told from it
    many, more = (dataclasses.replace(CONFIG, num_hidden_layers=layers) for layers in (32, 33))
    reckoned = [activation_bytes(config, tokens, Recompute.full, dtype.itemsize) for config in (many, more)]
    assert reckoned[1] - reckoned[0] == tokens * CONFIG.hidden_size * dtype.itemsize


@pytest.mark.parametrize("name", OptimizerName)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_training_is_what_is_reckoned(dtype, name):
    """Catches a state that `parallel=auto` and the refusals reckon with, and that training does not have."""
    model = CausalLM(CONFIG)
    initialize(model, 0)
    compute = ComputeModel(ParallelModel(model, whole_shards(model)), dtype)
    optimizer = Optimizer(compute.parallel.shards, OptimizerConfig(name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(float(optimizer.gradient_norm()), 1.0)
    moments = [tensor for _, _, tensor in optimizer.state_tensors()]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *compute.module.parameters())}
    held |= {tensor.data_ptr(): tensor.nbytes for tensor in (*moments, *(p.grad for p in model.parameters()))}
    reckoned = training_state_bytes(CONFIG, 1 if name is OptimizerName.muon else 2, dtype.itemsize)
    # Of Muon, the embedding and the head are AdamW's, with two moments (docs/log.md); routers stay in fp32.
    table = 4 * 2 * CONFIG.vocab_size * CONFIG.hidden_size if name is OptimizerName.muon else 0
    assert sum(held.values()) == pytest.approx(reckoned + table, rel=0.02)
