"""Update rules."""

import copy

import pytest
import torch

from moe_lm.kernels.newton_schulz import orthogonalize
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.shards import whole_shards
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
    optimizer.step(float(optimizer.gradient_norm()), factor)


@pytest.mark.parametrize("name", OptimizerName)
def test_decay_is_decoupled_and_spares_norms(name):
    """Catches decay mixed into the gradient, or applied to norms: with (almost) zero gradients only decay acts."""
    model = _model()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = Optimizer(
        whole_shards(model), OptimizerConfig(name, learning_rate=0.1, weight_decay=0.5, max_grad_norm=0)
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(float(optimizer.gradient_norm()), 0.5)
    for key, parameter in model.named_parameters():
        expected = before[key] if parameter.dim() == 1 else before[key] * (1 - 0.5 * 0.1 * 0.5)
        torch.testing.assert_close(parameter, expected, msg=key)


def test_adamw_is_torchs():
    """Catches a wrong beta, epsilon, rate or clipping: three clipped steps against torch's own AdamW and
    clip_grad_norm_."""
    model, twin = _model(), _model()
    optimizer = Optimizer(whole_shards(model), OptimizerConfig(learning_rate=0.01, weight_decay=0.0, max_grad_norm=0.7))
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for seed in range(3):
        _step(model, optimizer, seed)
        _set_gradients(twin, seed)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
        theirs.step()
    for ours, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_muon_is_nesterov_momentum_orthogonalised_matrix_by_matrix():
    """Catches a stack or the two halves of gate_up_proj treated as one matrix, a wrong momentum, scale or rate: three
    steps against a plain loop over matrices."""
    model = _model()
    options = OptimizerConfig(OptimizerName.muon, learning_rate=0.1, weight_decay=0.0, max_grad_norm=0)
    optimizer = Optimizer(whole_shards(model), options)
    matrices = {}
    for name, parameter in model.named_parameters():
        if ".layers." in name and "norm" not in name and "gate.weight" not in name:
            halves = parameter.detach().clone().unflatten(-2, (2 if "gate_up" in name else 1, -1))
            matrices[name] = [[m, torch.zeros_like(m)] for m in halves.flatten(0, -3)]
    for seed in range(3):
        _step(model, optimizer, seed)
        for name, pairs in matrices.items():
            gradients = model.get_parameter(name).grad.view(len(pairs), -1, pairs[0][0].shape[-1])
            for (weight, momentum), gradient in zip(pairs, gradients, strict=True):
                momentum.mul_(0.95).add_(gradient, alpha=0.05)
                direction = orthogonalize(gradient * 0.05 + momentum * 0.95).float()
                weight.sub_(direction, alpha=0.1 * 0.2 * max(weight.shape) ** 0.5)
    for name, pairs in matrices.items():
        ours = model.get_parameter(name).view(len(pairs), -1, pairs[0][0].shape[-1])
        # Newton–Schulz runs in bf16, where a batched product may round otherwise than a single one.
        torch.testing.assert_close(ours, torch.stack([w for w, _ in pairs]), rtol=0, atol=4e-3, msg=name)
    by_muon = {shard.name for shard, key, _ in optimizer.state_tensors() if key == "momentum_buffer"}
    assert by_muon == set(matrices) and len(by_muon) == 6


def test_muon_clips_as_if_gradients_were_smaller():
    """Catches clipping that Muon leaves out, or applies to some steps' momentum only: where every step is clipped by
    another factor, the direction depends on it."""
    models = [_model(), _model()]
    for model, limit in zip(models, (0.7, 0), strict=True):
        config = OptimizerConfig(OptimizerName.muon, learning_rate=0.1, max_grad_norm=limit)
        optimizer = Optimizer(whole_shards(model), config)
        for seed, size in ((0, 5.0), (1, 1e-3), (2, 0.5)):
            _set_gradients(model, seed)
            gradients = optimizer.gradients()
            torch._foreach_mul_(gradients, size)
            norm = float(optimizer.gradient_norm())
            if not limit and norm > 0.7:
                torch._foreach_mul_(gradients, 0.7 / norm)
            optimizer.step(norm, 1.0)
    for ours, reference in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=4e-3)


def test_muon_leaves_idle_experts_where_they_are():
    """Catches an expert without tokens that is walked along a stale direction at full speed, step after step."""
    model = _model()
    options = OptimizerConfig(OptimizerName.muon, learning_rate=0.1, weight_decay=0.0, max_grad_norm=0)
    optimizer = Optimizer(whole_shards(model), options)
    _step(model, optimizer, 0)
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone()
    _set_gradients(model, 1)
    experts.gate_up_proj.grad[2] = 0
    optimizer.step(float(optimizer.gradient_norm()), 1.0)
    moved = (experts.gate_up_proj - before).flatten(1).abs().amax(dim=1)
    assert moved[2] == 0 and (moved[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("name", OptimizerName)
def test_state_round_trip_is_bitwise(name):
    """Catches a moment or step count that is lost, swapped or rounded between saving and loading."""
    model = _model()
    optimizer = Optimizer(whole_shards(model), OptimizerConfig(name))
    for seed in range(2):
        _step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    restored = Optimizer(whole_shards(twin), OptimizerConfig(name))
    saved = {(shard.name, key): tensor.clone() for shard, key, tensor in optimizer.state_tensors()}
    restored.restore_state(lambda shard, key: saved[shard.name, key])
    for seed in range(2, 4):
        _step(model, optimizer, seed)
        _step(twin, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert {(shard.name, key) for shard, key, _ in restored.state_tensors()} == saved.keys()
    assert {f"{name}/{key}" for name, key in saved} == restored.state_kinds().keys()


def test_a_parameter_without_gradient_is_a_bug():
    """Catches a parameter that silently never trains."""
    model = _model()
    optimizer = Optimizer(whole_shards(model), OptimizerConfig())
    _set_gradients(model, 0)
    model.model.norm.weight.grad = None
    with pytest.raises(AssertionError, match="no gradient"):
        optimizer.gradient_norm()
