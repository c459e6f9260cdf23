"""The native step of decoding against the model's own forward: the same logits, token after token."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_lm.finetune.config import Part
from moe_lm.finetune.lora import adapt
from moe_lm.model import decoding
from moe_lm.model.attention import KeyValueCache
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM
from moe_lm.model.decoding import DecodingStep, decoding_step, plain_step
from moe_lm.model.initialization import initialize
from tests.kernels import DTYPES, TOLERANCE, Kernels
from tests.models import randomize

MIXTURE = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1e4,
    initializer_range=0.2,
)
ODD = dataclasses.replace(
    MIXTURE,
    vocab_size=101,
    hidden_size=35,
    intermediate_size=27,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=10,
    num_experts=5,
    num_experts_per_tok=3,
)
CONFIGS = {
    "mixture": MIXTURE,
    "odd sizes": ODD,
    "less than a vector": dataclasses.replace(ODD, hidden_size=7, intermediate_size=3, head_dim=2, num_experts=40),
    "window": dataclasses.replace(MIXTURE, sliding_window=5),
    "window of one": dataclasses.replace(MIXTURE, sliding_window=1),
    "tied": dataclasses.replace(MIXTURE, tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-2),
    "dense": dataclasses.replace(MIXTURE, family=ModelFamily.dense),
    "dense, odd sizes": dataclasses.replace(ODD, family=ModelFamily.dense),
    "every expert": dataclasses.replace(MIXTURE, num_experts_per_tok=8),
    "one expert, one layer": dataclasses.replace(MIXTURE, num_experts=1, num_experts_per_tok=1, num_hidden_layers=1),
}
PADDING = {
    "one text": [0],
    "two": [0, 3],
    "three": [6, 0, 1],
    "five": [0, 0, 2, 6, 5],
    "nineteen": [0, *range(6), *range(6), *range(6)],
}
PROMPT, NEW = 7, 12


def model_of(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    model = CausalLM(config)
    initialize(model, 0)
    return randomize(model, 1).to(dtype)


def cache_of(model: CausalLM, padding_B: Sequence[int]) -> KeyValueCache:
    return KeyValueCache(model.config, padding_B, PROMPT + NEW, model.lm_head.weight)


@torch.inference_mode()
def decoded(step: DecodingStep, id_BS: Tensor) -> Tensor:
    """Logits [NEW + 1, B, V] behind the prompt, and behind each token after it."""
    pieces = id_BS.split([PROMPT, *[1] * NEW], dim=1)
    return torch.stack([step(piece) for piece in pieces])


def errors(model: CausalLM, padding_B: Sequence[int]) -> Tensor:
    """How far what the model is decoded by is from its own forward in fp64, relative, of every token of every text."""
    id_BS = torch.randint(model.config.vocab_size, (len(padding_B), PROMPT + NEW))
    actual = decoded(decoding_step(model, cache_of(model, padding_B)), id_BS)
    assert actual.dtype == torch.float32
    wide = CausalLM(model.config).double()
    wide.load_state_dict(model.state_dict())
    expected = decoded(plain_step(wide, cache_of(wide, padding_B)), id_BS)
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(config: str, padding: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches a position, a window or padding that is off by one, an expert's or a text's row in another's place, and
    what a vectorised loop leaves at its end. In bf16 half of the tokens count where a token may have another expert."""
    error = errors(model_of(CONFIGS[config], dtype), PADDING[padding])
    if dtype is torch.float32:
        assert error.max() < TOLERANCE[dtype]
    else:
        assert error.median() < 4 * TOLERANCE[dtype]  # three layers of seven products
        if CONFIGS[config].num_experts_per_tok == CONFIGS[config].num_experts or not CONFIGS[config].is_mixture:
            assert error.max() < 20 * TOLERANCE[dtype]
    if kernels.path != "plain":
        kernels.assert_ran({"decode"})


@pytest.mark.parametrize("padding", ["one text", "nineteen"])
@pytest.mark.parametrize("config", ["mixture", "dense"])
@torch.inference_mode()
def test_bf16_is_rounded_where_the_plain_operators_round(config: str, padding: str, kernels: Kernels) -> None:
    """Catches a weight that comes before a rounding in one and behind it in the other, and a sum that is rounded once
    or at every step: nearly all logits are the same bits, but for attention, which rounds inside other kernels."""
    model = model_of(CONFIGS[config], torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    padding_B = PADDING[padding]
    id_BS = torch.randint(128, (len(padding_B), PROMPT + NEW))
    native, plain = (decoded(step(model, cache_of(model, padding_B)), id_BS) for step in (decoding_step, plain_step))
    assert (native == plain).float().mean() > 0.9
    assert kernels.path == "plain" or "decode" in kernels.calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_tokens_to_one_expert(dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches room for an even share only, and a read of experts without tokens."""
    model = model_of(dataclasses.replace(MIXTURE, num_experts_per_tok=1), dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20
        for layer in model.model.layers:
            layer.mlp.gate.weight[5, 0] = 20
            for stacked in layer.mlp.experts.parameters():
                stacked[:5], stacked[6:] = torch.nan, torch.nan
    assert errors(model, PADDING["nineteen"]).max() < 2 * TOLERANCE[dtype]
    assert kernels.path == "plain" or set(kernels.calls) == {"decode"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("kernels")
def test_a_text_does_not_depend_on_those_beside_it(dtype: torch.dtype) -> None:
    """Catches rows that mix, and an order of sums that depends on how many there are: within rounding, alone and in a
    batch, at the first token, before experts can differ."""
    model = model_of(dataclasses.replace(MIXTURE, family=ModelFamily.dense), dtype)
    padding_B = PADDING["five"]
    id_BS = torch.randint(128, (len(padding_B), PROMPT + NEW))
    together = decoded(decoding_step(model, cache_of(model, padding_B)), id_BS)
    for row, padding in enumerate(padding_B):
        pieces = id_BS[row : row + 1, padding:].split([PROMPT - padding, *[1] * NEW], dim=1)
        step = decoding_step(model, cache_of(model, [0]))
        with torch.inference_mode():
            alone = torch.cat([step(piece) for piece in pieces])
        assert (alone - together[:, row]).norm() < 4 * TOLERANCE[dtype] * alone.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["one text", "five", "nineteen"])
def test_threads_change_no_bit(padding: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """Catches threads that write one place, or go on before another is done."""
    if kernels.path == "plain":
        pytest.skip("torch's sums depend on threads")
    model, padding_B = model_of(MIXTURE, dtype), PADDING[padding]
    id_BS = torch.randint(128, (len(padding_B), PROMPT + NEW))
    one = decoded(decoding_step(model, cache_of(model, padding_B)), id_BS)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(decoded(decoding_step(model, cache_of(model, padding_B)), id_BS), one)
    finally:
        torch.set_num_threads(before)


def test_many_tokens_at_once_take_the_plain_step(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that one step leaves and the other does not find."""
    monkeypatch.setattr(decoding, "_MOST_VALUES", 0)
    assert errors(model_of(MIXTURE, torch.float32), PADDING["nineteen"]).max() < TOLERANCE[torch.float32]
    assert kernels.path == "plain" or kernels.calls.count("decode") == NEW


def test_what_the_native_step_does_not_know_is_left_to_the_model(kernels: Kernels) -> None:
    """Catches adapters that are passed over, and experts that drop no token where the model's own do."""
    adapted = model_of(MIXTURE, torch.float32)
    adapt(adapted, [Part.attention], 4, 1.0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_()
    limited = model_of(dataclasses.replace(MIXTURE, capacity_factor=1.0), torch.float32)
    for model in (adapted, limited, model_of(MIXTURE, torch.float64)):
        id_BS = torch.randint(128, (2, PROMPT + NEW))
        steps = (decoding_step(model, cache_of(model, [0, 1])), plain_step(model, cache_of(model, [0, 1])))
        assert torch.equal(*(decoded(step, id_BS) for step in steps))
    assert "decode" not in kernels.calls
