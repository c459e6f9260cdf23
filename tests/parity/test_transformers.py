"""The decoder against the installed transformers: same weights, same tokens, same outputs, losses and gradients."""

import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_lm.config import load
from moe_lm.kernels.loss import linear_cross_entropy
from moe_lm.model.accounting import count_parameters, training_flops_per_token
from moe_lm.model.balancing import load_balancing_loss, load_fraction
from moe_lm.model.config import LoadBalancing, ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize

SMALL = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}

# heads, key/value heads, experts, top-k, tied, window, theta, sequence length
MIXTURES = [
    (4, 4, 8, 2, False, None, 1e6, 33),
    (4, 2, 8, 2, True, None, 1e4, 64),
    (4, 1, 8, 2, False, 7, 1e6, 50),
    (8, 2, 4, 1, False, None, 1e6, 17),
    (8, 4, 4, 2, True, 16, 1e4, 128),
    (8, 8, 16, 4, False, None, 5e5, 40),
    (2, 1, 16, 2, False, 1, 1e6, 20),
    (4, 2, 16, 1, True, None, 1e6, 1),
    (4, 2, 4, 4, False, 100, 1e4, 99),
    (4, 4, 8, 4, False, None, 1e6, 257),
    (8, 2, 8, 1, False, 64, 1e6, 200),
]
DENSE = [
    (4, 4, False, None, 1e6, 33),
    (4, 2, True, 8, 1e4, 65),
    (8, 1, False, None, 1e6, 257),
    (4, 2, False, None, 1e4, 1),
]


def _mixture(case) -> ModelConfig:
    heads, groups, experts, top_k, tied, window, theta, _ = case
    return ModelConfig(
        **SMALL,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_experts=experts,
        num_experts_per_tok=top_k,
        tie_word_embeddings=tied,
        sliding_window=window,
        rope_theta=theta,
        initializer_range=0.2,
    )


def _dense(case) -> ModelConfig:
    heads, groups, tied, window, theta, _ = case
    return ModelConfig(
        **SMALL,
        family=ModelFamily.dense,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        sliding_window=window,
        rope_theta=theta,
        initializer_range=0.2,
    )


def _theirs(config: ModelConfig):
    shared = {
        name: getattr(config, name)
        for name in (*SMALL, "num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "sliding_window")
    } | {
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
    }
    if config.is_mixture:
        routing = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
        return MixtralForCausalLM(MixtralConfig(**shared, **routing, attn_implementation="eager"))
    return MistralForCausalLM(MistralConfig(**shared, attn_implementation="eager"))


def _pair(config: ModelConfig):
    ours, theirs = CausalLM(config), _theirs(config)
    initialize(ours, seed=3)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and (not missing or missing == ["lm_head.weight"])
    return ours, theirs


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


CASES = [("mixture", c) for c in MIXTURES] + [("dense", c) for c in DENSE]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family,case", CASES, ids=lambda v: str(v).replace(" ", ""))
def test_logits_losses_and_gradients_equal_transformers(family, case, padding):
    """Catches any difference of arithmetic: rotary layout, grouping, window edge, router, expert order, pooled loss,
    masks."""
    config = _mixture(case) if family == "mixture" else _dense(case)
    ours, theirs = _pair(config)
    length = case[-1]
    tokens = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    for row, pad in enumerate((0, length // 3, length // 2) if padding != "none" else ()):
        mask[row, slice(0, pad) if padding == "left" else slice(length - pad, length)] = 0
    valid = mask.bool()
    # transformers shifts labels itself, ours come shifted; a padding position predicts nothing.
    predicted = valid & F.pad(valid[:, :-1], (1, 0), value=False)
    labels = torch.where(predicted, tokens, -100)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    num_targets = int(predicted.sum())

    reference = theirs(tokens, attention_mask=mask, labels=labels, output_router_logits=config.is_mixture)
    output = ours(tokens, document_ids_BS=mask, routing_mask_BS=valid)
    logits = ours.logits(output.hidden_BSD)
    assert _relative(logits[valid], reference.logits[valid]) < 1e-5

    nll = linear_cross_entropy(output.hidden_BSD.flatten(0, 1), ours.lm_head.weight, shifted.flatten())
    their_loss = F.cross_entropy(reference.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(nll, their_loss, rtol=1e-5, atol=1e-6)
    loss, their_loss = nll / max(num_targets, 1), their_loss / max(num_targets, 1)
    if num_targets:
        auxiliary = theirs.config.router_aux_loss_coef * reference.aux_loss if config.is_mixture else 0.0
        assert torch.allclose(loss + auxiliary, reference.loss, rtol=1e-5)

    if config.is_mixture:
        statistics = output.statistics
        pooled = load_balancing_loss(
            statistics.probability_sum_E,
            load_fraction(statistics.count_E),
            valid.sum(),
            config.num_experts_per_tok,
            LoadBalancing.pooled,
        )
        arguments = (config.num_experts, config.num_experts_per_tok)
        their_pooled = load_balancing_loss_func(reference.router_logits, *arguments, mask)
        assert torch.allclose(pooled, their_pooled, rtol=1e-6, atol=0)
        loss, their_loss = loss + 0.5 * pooled, their_loss + 0.5 * their_pooled

    loss.backward()
    their_loss.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        if their_gradients[name] is None or their_gradients[name].norm() < 1e-9:
            assert parameter.grad.norm() < 1e-6, name
        else:
            assert _relative(parameter.grad, their_gradients[name]) < 1e-4, name


@pytest.mark.parametrize(("family", "case"), CASES, ids=str)
def test_parameters_are_counted_exactly(family, case):
    """Catches a formula of `accounting` that drifts from the model, or the model from transformers'."""
    config = _mixture(case) if family == "mixture" else _dense(case)
    with torch.device("meta"):
        ours, theirs = CausalLM(config), _theirs(config)
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


def test_training_flops_of_mixtral_8x7b():
    """Catches a wrong factor in the yardstick of utilisation: 6·(active − look-up) + 6·L·S·N·H, written out."""
    config = load("pretrain", ["experiment=mixtral_8x7b"]).model
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 3 * 4096 * 14336) + 32000 * 4096
    norms = (2 * 32 + 1) * 4096
    expected = 6 * (matrices + norms) + 6 * 32 * 4096 * 32 * 128
    assert training_flops_per_token(config, 4096) == expected


def test_mixtral_8x7b_is_the_real_thing():
    """Catches any field of the published model that is wrong: exact totals, and every tensor's name and shape."""
    config = load("pretrain", ["experiment=mixtral_8x7b"]).model
    with torch.device("meta"):
        ours = CausalLM(config)
        theirs = MixtralForCausalLM(MixtralConfig())  # transformers' defaults are Mixtral 8x7B
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    count = count_parameters(config)
    assert count.total == theirs.num_parameters() == 46_702_792_704
    one_expert = sum(p[0].numel() for n, p in theirs.named_parameters() if ".experts." in n)
    assert count.active == theirs.num_parameters() - 6 * one_expert == 12_879_925_248
    for name in ("rms_norm_eps", "sliding_window", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs.config, name)
    assert config.rope_theta == theirs.config.rope_parameters["rope_theta"]
