"""Update rules."""

import copy

import pytest
import torch

from moe_lm.kernels.newton_schulz import orthogonalize
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.training.config import OptimizerConfig, OptimizerName
from moe_lm.training.optimizer import Optimizer

CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=4,
)


def _model() -> CausalLM:
    model = CausalLM(CONFIG)
    initialize(model, 0)
    return model


def _set_gradients(model: CausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _step(model: CausalLM, optimizer: Optimizer, seed: int, factor: float = 1.0) -> None:
    _set_gradients(model, seed)
    optimizer.step(optimizer.gradient_norm(), factor)


@pytest.mark.parametrize("name", OptimizerName)
def test_decay_is_decoupled_and_spares_norms(name):
    """Catches decay mixed into the gradient, or applied to norms: with (almost) zero gradients only decay acts."""
    model = _model()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = Optimizer(model, OptimizerConfig(name, learning_rate=0.1, weight_decay=0.5, max_grad_norm=0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(optimizer.gradient_norm(), 0.5)
    for key, parameter in model.named_parameters():
        expected = before[key] if parameter.dim() == 1 else before[key] * (1 - 0.5 * 0.1 * 0.5)
        torch.testing.assert_close(parameter, expected, msg=key)


def test_adamw_is_torchs():
    """Catches a wrong beta, epsilon, rate or clipping: three clipped steps against torch's own AdamW and
    clip_grad_norm_."""
    model, twin = _model(), _model()
    optimizer = Optimizer(model, OptimizerConfig(learning_rate=0.01, weight_decay=0.0, max_grad_norm=0.7))
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for seed in range(3):
        _step(model, optimizer, seed)
        _set_gradients(twin, seed)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
        theirs.step()
    for ours, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_each_expert_by_itself():
    """Catches a stack treated as one matrix, a wrong scale, or Muon applied to embedding, head, gate or norms."""
    model = _model()
    before = copy.deepcopy(dict(model.named_parameters()))
    options = OptimizerConfig(OptimizerName.muon, learning_rate=0.1, weight_decay=0.0, max_grad_norm=0)
    optimizer = Optimizer(model, options)
    _step(model, optimizer, 0)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    moved = before[key] - dict(model.named_parameters())[key]
    gradient = dict(model.named_parameters())[key].grad
    for expert in range(4):
        expected = 0.1 * 0.2 * 48**0.5 * orthogonalize(gradient[expert]).float()
        torch.testing.assert_close(moved[expert], expected, rtol=2e-2, atol=2e-3)
    state = dict(optimizer.state_tensors())
    by_muon = {name.rsplit("/", 1)[0] for name in state if name.endswith("momentum_buffer")}
    assert by_muon == {
        f"model.layers.0.{name}"
        for name in (
            *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        )
    }


@pytest.mark.parametrize("name", OptimizerName)
def test_state_round_trip_is_bitwise(name):
    """Catches a moment or step count that is lost, swapped or rounded between saving and loading."""
    model = _model()
    optimizer = Optimizer(model, OptimizerConfig(name))
    for seed in range(2):
        _step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    restored = Optimizer(twin, OptimizerConfig(name))
    restored.load_state_tensors({key: tensor.clone() for key, tensor in optimizer.state_tensors()})
    for seed in range(2, 4):
        _step(model, optimizer, seed)
        _step(twin, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert dict(restored.state_tensors()).keys() == dict(optimizer.state_tensors()).keys()


def test_a_parameter_without_gradient_is_a_bug():
    """Catches a parameter that silently never trains."""
    model = _model()
    optimizer = Optimizer(model, OptimizerConfig())
    _set_gradients(model, 0)
    model.model.norm.weight.grad = None
    with pytest.raises(AssertionError, match="no gradient"):
        optimizer.gradient_norm()
