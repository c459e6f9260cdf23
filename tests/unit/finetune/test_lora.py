"""Adapters, and what of a model is trained."""

import dataclasses
from pathlib import Path

import pytest
import torch

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.checkpoint.tensor_file import write_tensors
from moe_lm.errors import InputError, RunError
from moe_lm.finetune import adapter
from moe_lm.finetune.adapter import write_adapter
from moe_lm.finetune.base import FromBase, choose_trained, said_trained, trained_counts
from moe_lm.finetune.config import LORA_PARTS, FinetuneConfig, Method, Part
from moe_lm.finetune.lora import adapter_names, initial_adapter, is_adapter, merged, part_of
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.initialization import initialize
from moe_lm.parallel.layout import Layout
from moe_lm.parallel.placement import contiguous
from moe_lm.training.state import MODEL
from tests.models import InMemory

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
MIXTURE = ModelConfig(**SHAPE, num_experts=4)
DENSE = ModelConfig(**SHAPE, family=ModelFamily.dense)
LORA = FinetuneConfig(Method.lora, [part.name for part in LORA_PARTS], rank=4, alpha=12.0)
DENSE_LORA = FinetuneConfig(Method.lora, [p.name for p in LORA_PARTS if p is not Part.router], rank=4, alpha=12.0)


def _adapted(model: ModelConfig, config: FinetuneConfig = LORA) -> CausalLM:
    """A model with adapters that all do something."""
    adapted = CausalLM(model)
    choose_trained(adapted, config)
    initialize(adapted, seed=5)
    return adapted


def _tokens() -> torch.Tensor:
    return torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", [MIXTURE, DENSE], ids=["mixture", "dense"])
def test_adapters_are_the_merged_weights(model):
    """Catches a scale left out, an A applied to another expert's rows, and a merge that is not what was trained."""
    adapted, whole = _adapted(model, DENSE_LORA if model is DENSE else LORA), CausalLM(model)
    parameters = dict(adapted.named_parameters())
    for name, parameter in whole.named_parameters():
        value = parameters[name]
        if adapter_names(name)[0] in parameters:
            value = merged(name, value, parameters.__getitem__, LORA.scale)
            assert not torch.equal(value, parameters[name])
        parameter.data = value.detach()
    ours, theirs = (m.logits(m(_tokens()).hidden_BSD) for m in (adapted, whole))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert sum(map(is_adapter, parameters)) == 2 * (2 + 2 * (7 if model is DENSE else 4 + 1 + 2))


def test_a_small_change_survives_a_merge_into_a_bf16_base():
    """Catches a merge that is rounded to the base's type, in which most of a small change is lost."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = {"q.lora_A": torch.full((1, 32), 1e-2), "q.lora_B": torch.full((32, 1), 1e-2)}
    change = merged("q.weight", weight, parts.__getitem__, 1.0) - weight.float()
    assert change.dtype is torch.float32 and torch.allclose(change, torch.full((32, 32), 1e-4), rtol=1e-2)


def test_a_fresh_adapter_changes_nothing_and_can_learn():
    """Catches a beginning that is not the base model, and one from which no gradient leads on (A and B both zero)."""
    base = CausalLM(MIXTURE)
    initialize(base, seed=5)
    adapted = _adapted(MIXTURE)
    weights = dict(base.named_parameters())
    for name, parameter in adapted.named_parameters():
        generator = torch.Generator().manual_seed(3)
        value = initial_adapter(name, list(parameter.shape), generator) if is_adapter(name) else weights[name]
        parameter.data = value.detach().clone()
    # To rounding: the base's SwiGLU is one fused pass, the adapted one stands between two products.
    torch.testing.assert_close(adapted(_tokens()).hidden_BSD, base(_tokens()).hidden_BSD, rtol=1e-5, atol=1e-5)
    adapted.logits(adapted(_tokens()).hidden_BSD).square().sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name
        first, second = ("lora_A", "lora_B") if "embed_tokens" in name else ("lora_B", "lora_A")
        if name.endswith(first):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        elif name.endswith(second):
            assert parameter.grad is not None and not parameter.grad.any(), f"{name}: the other one is zero"


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("model", [MIXTURE, DENSE], ids=["mixture", "dense"])
def test_gradients_reach_what_is_named_and_nothing_else(model, part, method):
    """Catches a part that is silently skipped, and one that is trained though it was not named."""
    if method is Method.lora and part not in LORA_PARTS:
        with pytest.raises(InputError, match="LoRA adapts"):
            FinetuneConfig(method, [part.name])
        return
    config = FinetuneConfig(method, [part.name])
    adapted = _adapted(model, config)
    has_part = model.is_mixture or part is not Part.router
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert bool(trained) == has_part
    if not has_part:
        return
    output = adapted(_tokens())
    loss = adapted.logits(output.hidden_BSD).logsumexp(-1).sum()
    if output.statistics is not None:
        loss = loss + output.statistics.probability_sum_E.square().sum()
    loss.backward()
    for name, parameter in adapted.named_parameters():
        named = part_of(name) is part and (method is Method.full or is_adapter(name))
        assert parameter.requires_grad == named, name
        if named:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    counts, total = trained_counts(model, config)
    assert counts == {part: sum(dict(adapted.named_parameters())[name].numel() for name in trained)}
    assert f"{sum(counts.values()):,} of {total:,}" in said_trained(model, config) and part.name in said_trained(
        model, config
    )


def test_the_experts_of_lora_get_gradients_of_their_own():
    """Catches an adapter of one expert that learns from another's tokens: an expert without tokens gets zeros."""
    adapted = _adapted(ModelConfig(**SHAPE, num_experts=4, num_experts_per_tok=1))
    for layer in adapted.model.layers:
        layer.mlp.gate.weight.data[:] = 0
        layer.mlp.gate.lora_B.data[:] = 0
        layer.mlp.gate.weight.data[0], layer.mlp.gate.weight.data[2] = 1, -1  # one of the two, whatever the token
    adapted.logits(adapted(_tokens()).hidden_BSD).square().sum().backward()
    experts = adapted.model.layers[1].mlp.experts
    for parameter in (experts.gate_up_proj_lora_A, experts.down_proj_lora_B):
        used = parameter.grad.flatten(1).any(dim=1).tolist()
        assert used == [True, False, True, False]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"parts": ["mlp"]}, "finetune.parts=[mlp]: there is no such part"),
        ({"experts": ["one"]}, "finetune.experts=[one]: must be numbers"),
        ({"experts": ["1"], "parts": ["attention"]}, "finetune.parts leaves the experts out"),
        ({"rank": 0}, "finetune.rank=0: must be at least 1"),
        ({"parts": ["head", "head"]}, "finetune.parts=[head,head]: head stands there twice"),
        ({"experts": ["1", "01"]}, "finetune.experts=[1,01]: expert 1 stands there twice"),
        ({"alpha": 0.0}, "finetune.alpha=0.0: must be greater than 0"),
    ],
)
def test_a_wrong_choice_is_named(options, sentence):
    """Catches a choice that trains something else than the user meant, in silence."""
    with pytest.raises(InputError) as error:
        FinetuneConfig(**options)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (DENSE, {"parts": ["router"]}, "has no router"),
        (DENSE, {"experts": ["0"]}, "the base is a dense model"),
        (ModelConfig(**SHAPE, num_experts=4, tie_word_embeddings=True), {"parts": ["head", "norms"]}, "give embedding"),
        (
            ModelConfig(**SHAPE, num_experts=4, tie_word_embeddings=True),
            {"method": Method.lora, "parts": ["head"]},
            "would be merged into both",
        ),
        (MIXTURE, {"experts": ["4"]}, "finetune.experts=[4]: the base has 4 experts"),
        (
            MIXTURE,
            {"method": Method.lora, "rank": 33},
            "finetune.rank=33: no matrix of the base has a rank above its hid",
        ),
    ],
)
def test_a_choice_that_the_base_does_not_have_is_named(model, options, sentence):
    """Catches a part or an expert that is silently not there."""

    class Base:
        config = model

    with pytest.raises(InputError) as error:
        FromBase(Base(), FinetuneConfig(**options), 0, "")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("layout", "cut_over"),
    [(Layout(1, 4, 1), 0), (Layout(1, 8, 1), 8), (Layout(1, 4, 2), 0), (Layout(1, 6, 2), 3)],
    ids=str,
)
def test_a_rank_that_can_not_be_cut_as_experts_are_is_named(layout, cut_over):
    """Catches adapters whose experts are cut finer than they can be, found only then; and a rank that is refused where
    whole experts are dealt out."""
    placement = contiguous(MIXTURE.num_hidden_layers, MIXTURE.num_experts, layout.ep) if layout.ep > 1 else None
    for rank in (24, 7):
        start = FromBase(InMemory(CausalLM(MIXTURE)), dataclasses.replace(LORA, rank=rank), 0, "")
        if rank == 24 or not cut_over:
            start.check_layout(layout, placement)
            continue
        said = f"^finetune.rank=7: each expert is cut over {cut_over} processes, .* give a multiple of {cut_over}, or"
        with pytest.raises(InputError, match=said):
            start.check_layout(layout, placement)


@pytest.mark.parametrize("fault", ["a bit", "a name"])
def test_an_adapter_that_the_disk_has_changed_is_not_published(tmp_path, monkeypatch, fault):
    """Catches a file of adapters that nobody reads before its user does."""
    named = _adapted(MIXTURE).named_parameters()
    slices = [TensorSlice.whole(MODEL + name, value.detach()) for name, value in named if is_adapter(name)]
    checkpoint = Checkpoint(CheckpointStore(tmp_path / "checkpoints", CheckpointConfig()).save(1, slices, {}))
    for directory in ("good", "bad"):
        (tmp_path / directory).mkdir()
    write_adapter(tmp_path / "good", checkpoint, MIXTURE, LORA, "base")

    def changed(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        name, value = tensors.popitem()
        flipped = value.clone()
        flipped.view(torch.int32).flatten()[3] ^= 1
        write_tensors(path, {**tensors, name: flipped} if fault == "a bit" else tensors)

    monkeypatch.setattr(adapter, "write_tensors", lambda path, tensors: changed(path, dict(tensors)))
    with pytest.raises(RunError, match=r"adapter_model.safetensors: does not hold the adapters that were written; try"):
        write_adapter(tmp_path / "bad", checkpoint, MIXTURE, LORA, "base")


def test_a_router_is_kept_near_the_one_it_began_with():
    """Catches a drift that is not 0 at the beginning, not the divergence of the two routers, or counts padding."""
    model = CausalLM(ModelConfig(**SHAPE, num_experts=4, router_drift_coef=1.0))
    initialize(model, seed=5)
    for layer in model.model.layers:
        layer.mlp.gate.starting_weight.copy_(layer.mlp.gate.weight.detach())
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1:] = False
    assert model(_tokens(), routing_mask_BS=mask).statistics.drift_sum.abs().max() < 1e-5
    router = model.model.layers[0].mlp.gate
    router.weight.data += torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(2))
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(4))
    _, statistics = router(x, mask.flatten())
    start, now = ((x @ w.T).log_softmax(-1)[:20] for w in (router.starting_weight, router.weight))
    expected = torch.nn.functional.kl_div(now, start, log_target=True, reduction="sum")
    assert statistics.drift_sum.item() == pytest.approx(expected.item(), rel=1e-5) and expected > 1
    statistics.drift_sum.backward()
    assert router.weight.grad.abs().sum() > 0
