"""Upcycling: which function the mixture computes, what is copied where, and what is drawn anew."""

import dataclasses

import pytest
import torch

from moe_lm.errors import InputError
from moe_lm.finetune.upcycle import UpcycledModel, UpcyclePlan
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
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
}
DENSE = ModelConfig(**SHAPE, family=ModelFamily.dense, sliding_window=9)
TIED = ModelConfig(**SHAPE, family=ModelFamily.dense, tie_word_embeddings=True)
MIXTURE = ModelConfig(**SHAPE, num_experts=3, num_experts_per_tok=2)
TOKENS = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(1))


def _base(config: ModelConfig, dtype: torch.dtype = torch.float32) -> InMemory:
    model = CausalLM(config)
    initialize(model, seed=3)
    return InMemory(model.to(dtype))


def _whole(source) -> CausalLM:
    model = CausalLM(source.config)
    model.load_state_dict(dict(source.parameters()), strict=not source.config.tie_word_embeddings)
    return model


@torch.no_grad()
def _logits(model: CausalLM) -> torch.Tensor:
    return model.logits(model(TOKENS).hidden_BSD)


def _difference(upcycled: UpcycledModel) -> float:
    """Largest difference of logits, in the largest of the base's."""
    expected = _logits(_whole(upcycled.base))
    return ((_logits(_whole(upcycled)) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("experts", [(8, None), (4, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("config", [DENSE, TIED], ids=["window", "tied"])
def test_copies_of_a_dense_block_compute_its_function(config, experts):
    """Catches a gate and up that are swapped, weights that do not sum to one, a head or a norm that is not copied."""
    upcycled = UpcycledModel(_base(config), UpcyclePlan(*experts))
    assert upcycled.keeps_function and _difference(upcycled) < 1e-5
    assert upcycled.config.num_experts_per_tok == (experts[1] or 2)


def test_the_router_is_random_and_spreads_tokens():
    """Catches a router of zeros, with which all tokens go to the same experts, and copies never differ."""
    upcycled = UpcycledModel(_base(DENSE), UpcyclePlan(4))
    model = _whole(upcycled)
    with torch.no_grad():
        count_LE = model(TOKENS).statistics.count_E
    assert (count_LE > 0).all() and model.model.layers[0].mlp.gate.weight.std() > 0.1
    other = UpcycledModel(_base(DENSE), UpcyclePlan(4, seed=1))
    name = "model.layers.0.mlp.gate.weight"
    assert torch.equal(upcycled.tensor(name), upcycled.tensor(name))
    assert not torch.equal(upcycled.tensor(name), other.tensor(name))


def test_noise_is_a_share_of_each_matrixs_own_deviation():
    """Catches one deviation for gate and up together, the same noise for every expert, or noise on what is copied."""
    base = _base(DENSE)
    with torch.no_grad():
        base.model.model.layers[0].mlp.gate_proj.weight.mul_(100)
    upcycled = UpcycledModel(base, UpcyclePlan(6, noise=0.1))
    assert not upcycled.keeps_function
    block = base.model.model.layers[0].mlp
    noise = upcycled.tensor("model.layers.0.mlp.experts.gate_up_proj") - torch.cat(
        (block.gate_proj.weight, block.up_proj.weight)
    )
    for matrix, added in ((block.gate_proj.weight, noise[:, :20]), (block.up_proj.weight, noise[:, 20:])):
        assert added.std().item() == pytest.approx(0.1 * matrix.std().item(), rel=0.05)
        assert abs(torch.corrcoef(added.flatten(1)).triu(1)).max() < 0.2
    assert torch.equal(
        upcycled.tensor("model.layers.0.self_attn.q_proj.weight"), base.tensor("model.layers.0.self_attn.q_proj.weight")
    )


def test_reinitialisation_draws_the_same_dimensions_of_all_three_matrices_anew():
    """Catches other dimensions in down than in gate and up (a neuron half kept), the same ones in every expert, another
    share, or values of another mean and deviation than those they replace.
    """
    base = _base(dataclasses.replace(DENSE, intermediate_size=200))
    with torch.no_grad():
        base.model.model.layers[1].mlp.down_proj.weight.add_(0.5)
    upcycled = UpcycledModel(base, UpcyclePlan(3, reinitialize=0.4))
    block = base.model.model.layers[1].mlp
    gate_up = upcycled.tensor("model.layers.1.mlp.experts.gate_up_proj")
    down = upcycled.tensor("model.layers.1.mlp.experts.down_proj")
    changed = []
    for expert in range(3):
        gate, up = gate_up[expert].chunk(2)
        anew = [
            (gate != block.gate_proj.weight).any(1),
            (up != block.up_proj.weight).any(1),
            (down[expert] != block.down_proj.weight).any(0),
        ]
        assert torch.equal(anew[0], anew[1]) and torch.equal(anew[1], anew[2]) and anew[0].sum() == 80
        drawn, stood = down[expert][:, anew[2]], block.down_proj.weight[:, anew[2]]
        assert drawn.mean().item() == pytest.approx(stood.mean().item(), abs=0.02)
        assert drawn.std().item() == pytest.approx(stood.std().item(), rel=0.1)
        changed.append(anew[0])
    assert not torch.equal(changed[0], changed[1]) and not torch.equal(changed[1], changed[2])


def test_a_mixture_with_more_experts_computes_its_function():
    """Catches copies whose router rows belong to other experts, and a choice of fewer experts than all copies."""
    upcycled = UpcycledModel(_base(MIXTURE), UpcyclePlan(9))
    assert upcycled.config.num_experts_per_tok == 6
    assert upcycled.keeps_function and upcycled.copies_never_part and _difference(upcycled) < 1e-5


def test_fewer_experts_per_token_compute_another_function():
    """Catches a claim that is not so: copies of the best expert push the second-best out."""
    upcycled = UpcycledModel(_base(MIXTURE), UpcyclePlan(6, 2, noise=0.01))
    assert not upcycled.keeps_function and not upcycled.copies_never_part
    assert _difference(upcycled) > 0.01
    rows = upcycled.tensor("model.layers.0.mlp.gate.weight")
    assert torch.equal(rows[:3], upcycled.base.tensor("model.layers.0.mlp.gate.weight"))
    assert not torch.equal(rows[3:], rows[:3]) and torch.allclose(rows[3:], rows[:3], atol=0.05)


def test_what_a_mixture_has_learned_stays():
    """Catches noise on the trained experts themselves."""
    base = _base(MIXTURE)
    upcycled = UpcycledModel(base, UpcyclePlan(6, noise=0.1, reinitialize=0.5))
    for name in ("gate_up_proj", "down_proj"):
        stack = upcycled.tensor(f"model.layers.0.mlp.experts.{name}")
        trained = base.tensor(f"model.layers.0.mlp.experts.{name}")
        assert torch.equal(stack[:3], trained)
        assert all(not torch.equal(stack[3 + expert], trained[expert]) for expert in range(3))
    rows = upcycled.tensor("model.layers.0.mlp.gate.weight")
    assert torch.equal(rows[3:], rows[:3])  # the choice is kept


def test_bf16_stays_bf16_and_equal():
    """Catches a router or an expert that is widened, and copies that are rounded apart."""
    upcycled = UpcycledModel(_base(DENSE, torch.bfloat16), UpcyclePlan(4))
    assert {tensor.dtype for _, tensor in upcycled.parameters()} == {torch.bfloat16}
    assert _difference(UpcycledModel(_base(DENSE, torch.bfloat16), UpcyclePlan(4))) < 1e-5


def test_each_parameter_says_what_it_is_made_of():
    """Catches a report that is not of this plan."""
    plain = UpcycledModel(_base(DENSE), UpcyclePlan(4))
    assert plain.origin("model.norm.weight") == "copied"
    assert plain.origin("model.layers.1.mlp.gate.weight") == "random, N(0, 0.2²)"
    assert plain.origin("model.layers.1.mlp.experts.down_proj") == "4 copies of the dense block"
    more = UpcycledModel(_base(MIXTURE), UpcyclePlan(6, noise=0.1, reinitialize=0.5))
    said = more.origin("model.layers.1.mlp.experts.down_proj")
    assert said.startswith("2 copies of each expert, the first as it was, noise of 0.1") and "0.5 of their" in said


@pytest.mark.parametrize(
    ("config", "plan", "words"),
    [
        (MIXTURE, {"num_experts": 8}, "num_experts=8: the base has 3 experts in a layer; give a multiple of that, 6"),
        (MIXTURE, {"num_experts": 3}, "num_experts=3: the base has 3 experts"),
        (MIXTURE, {"num_experts": 6, "num_experts_per_tok": 2}, "num_experts_per_tok=2: copies of an expert"),
        (MIXTURE, {"num_experts": 0}, "num_experts=0: must be at least 1"),
        (DENSE, {"num_experts": 0}, "num_experts=0: must be at least 1"),
        (
            DENSE,
            {"num_experts": 1},
            "num_experts=1: a token is sent to 2 experts where num_experts_per_tok is not given",
        ),
        (DENSE, {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5: must be at most num_experts=4"),
        (DENSE, {"num_experts": 4, "num_experts_per_tok": 0}, "num_experts_per_tok=0: must be at least 1"),
        (DENSE, {"num_experts": 4, "noise": -0.1}, "noise=-0.1: must not be negative"),
        (DENSE, {"num_experts": 4, "noise": 1e39}, "noise=1e+39: must be at most 1000; 0.01 tells copies apart"),
        (DENSE, {"num_experts": 4, "reinitialize": 1.5}, "reinitialize=1.5: must be a share"),
        (
            DENSE,
            {"num_experts": 4, "reinitialize": 0.049},
            "20 intermediate dimensions, so none would be drawn anew; give 0.0505 or more",
        ),
    ],
    ids=str,
)
def test_plans_that_can_not_be_carried_out_are_refused(config, plan, words):
    """Catches a traceback, or a mixture that is not what was asked for."""
    with pytest.raises(InputError) as caught:
        UpcycledModel(_base(config), UpcyclePlan(**plan))
    assert words in str(caught.value)
