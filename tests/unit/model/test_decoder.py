"""The decoder by itself: documents, cache, recomputation, initial weights."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.kernels import native
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.attention import KeyValueCache
from moe_lm.model.config import ModelConfig, ModelFamily, Recompute
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
VARIANTS = {
    "mixture": CONFIG,
    "dense": dataclasses.replace(CONFIG, family=ModelFamily.dense),
    "window": dataclasses.replace(CONFIG, sliding_window=5),
}


def _model(config: ModelConfig = CONFIG, seed: int = 0) -> CausalLM:
    model = CausalLM(config)
    initialize(model, seed)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_documents_alone(variant):
    """Catches attention or positions that cross a document's boundary: within 1e-5 of each document run by itself."""
    model = _model(VARIANTS[variant])
    documents = [torch.randint(97, (1, n)) for n in (7, 1, 12, 20)]
    lengths = [d.shape[1] for d in documents]
    packed = model(
        torch.cat(documents, dim=1),
        position_ids_BS=torch.cat([torch.arange(n) for n in lengths])[None],
        document_ids_BS=torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])[None],
    )
    for hidden, document in zip(packed.hidden_BSD.split(lengths, dim=1), documents, strict=True):
        torch.testing.assert_close(hidden, model(document).hidden_BSD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_equals_the_whole_sequence(variant):
    """Catches a cache that forgets, overwrites or misplaces a token, and a window or position that is off by one."""
    model = _model(VARIANTS[variant]).eval()
    tokens = torch.randint(97, (2, 23))
    cache = KeyValueCache(model.config, [0, 0], 23, model.lm_head.weight)
    with torch.no_grad():
        pieces = [model(piece, cache=cache).hidden_BSD for piece in tokens.split([9, 1, 1, 5, 1, 6], dim=1)]
        whole = model(tokens).hidden_BSD
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def _gradients(model: CausalLM, tokens: torch.Tensor):
    model.zero_grad()
    output = model(tokens)
    loss = linear_cross_entropy(output.hidden_BSD.flatten(0, 1), model.lm_head.weight, tokens.roll(-1).flatten())
    (loss + output.statistics.probability_sum_E.square().sum() + output.statistics.z_sum.sum()).backward()
    return output, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
def test_recomputed_layers_give_the_same_gradients(mode):
    """Catches activation checkpointing that changes a number, or counts routing statistics twice."""
    model, tokens = _model(), torch.randint(97, (3, 31))
    plain_output, plain = _gradients(model, tokens)
    model.model.recompute = mode
    output, recomputed = _gradients(model, tokens)
    for ours, theirs in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(output.statistics.count_E, plain_output.statistics.count_E)


class _Operators(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator] += 1
        return operator(*args, **(kwargs or {}))


def _calls(mode: Recompute, dtype: torch.dtype) -> Counter:
    model = _model().to(dtype)
    model.model.recompute = mode
    with _Operators() as operators:
        model(torch.randint(97, (3, 31))).hidden_BSD.sum().backward()
    return operators.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_mode_chooses_experts_twice_and_selective_multiplies_no_matrix_twice(dtype, monkeypatch):
    """Catches a product that is not kept, by whatever name torch calls it, and a norm that is."""
    monkeypatch.setattr(native, "library", lambda: None)  # a native norm is no operator that could be counted
    aten, experts = torch.ops.aten, torch.ops.moe_lm.expert_mixture.default
    none, selective, full = (_calls(mode, dtype) for mode in Recompute)
    assert none[aten.topk.default] == selective[aten.topk.default] == full[aten.topk.default] > 0
    for product in (aten.mm.default, experts):
        assert none[product] == selective[product] < full[product]
    norm = aten.linalg_vector_norm.default
    assert none[norm] < selective[norm] == full[norm]


@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
def test_recomputation_keeps_the_routing_decision(mode):
    """Catches a backward that routes again: the gate is changed between forward and backward, and only the choice of
    the forward may count. Every expert that got no token in the forward must keep an exactly zero gradient."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, num_experts_per_tok=1)
    model = _model(config)
    model.model.recompute = mode
    output = model(torch.randint(97, (1, 5)))
    idle = output.statistics.count_E[0] == 0
    assert idle.any()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.data.neg_()  # .data: the version counter must not see it
    output.hidden_BSD.square().sum().backward()
    gradient = model.model.layers[0].mlp.experts.down_proj.grad
    assert torch.equal(gradient.flatten(1).abs().sum(1) == 0, idle)


def test_idle_experts_get_zero_gradients_not_none():
    """Catches the None that makes collectives hang and momentum drift when an expert receives no token."""
    model = _model()
    model(torch.randint(97, (1, 1))).hidden_BSD.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "lm_head.weight")


def test_initial_weights_depend_on_seed_and_name_only():
    """Catches weights that depend on what else is built, layers or projections that start equal, norms that are not
    1."""
    one, wider, other = _model(seed=5), _model(dataclasses.replace(CONFIG, vocab_size=300), seed=5), _model(seed=6)
    shared = dict(wider.named_parameters())
    for (name, a), c in zip(one.named_parameters(), other.parameters(), strict=True):
        if "layers" in name:
            assert torch.equal(a, shared[name]), name
        assert torch.equal(a, torch.ones_like(a)) if a.dim() == 1 else not torch.equal(a, c), name
    first, second = one.model.layers
    assert not torch.equal(first.self_attn.q_proj.weight, second.self_attn.q_proj.weight)
    assert not torch.equal(first.self_attn.k_proj.weight, first.self_attn.v_proj.weight)
    gate_up = first.mlp.experts.gate_up_proj
    assert not torch.equal(gate_up[0], gate_up[1]) and gate_up.std().item() == pytest.approx(0.3, rel=0.05)
    assert first.self_attn.o_proj.weight.std().item() == pytest.approx(0.3 / 2, rel=0.1)


def test_no_router_of_a_packed_row_sees_padding():
    """Catches padding that counts as routed tokens in the statistics of a batch."""
    model = _model()
    tokens, mask = torch.randint(97, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 4:] = False
    output = model(tokens, document_ids_BS=mask.long(), routing_mask_BS=mask)
    assert output.statistics.count_E.sum(-1).tolist() == [20 * 2, 20 * 2]
    torch.testing.assert_close(output.statistics.probability_sum_E.sum(-1), torch.tensor([20.0, 20.0]))


def test_padding_behind_a_row_without_document_ids_changes_nothing_before_it():
    """Catches plain causal attention, which batches without document masks take, letting padding in."""
    model = _model()
    tokens, mask = torch.randint(97, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 4:] = False
    plain = model(tokens, routing_mask_BS=mask).hidden_BSD
    masked = model(tokens, document_ids_BS=mask.long(), routing_mask_BS=mask).hidden_BSD
    torch.testing.assert_close(plain[mask], masked[mask], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain[~mask], masked[~mask])
