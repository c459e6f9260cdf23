"""Decoding token after token: a step of native code where it takes the model, else the model's own forward.

Letters: B texts, Q new tokens of each, S capacity of the cache, D hidden, H head width, V vocabulary.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_lm.kernels import native
from moe_lm.kernels.decode import DecoderTensors, LayerTensors, NativeDecoding
from moe_lm.model.attention import Attention, KeyValueCache, rotary_angles
from moe_lm.model.decoder import CausalLM, Decoder, Layer, OutputHead, RMSNorm
from moe_lm.model.dispatch import LocalDispatcher
from moe_lm.model.linear import Linear
from moe_lm.model.moe import DenseFeedForward, Experts, MixtureOfExperts
from moe_lm.model.router import Router

_COMPUTED = {CausalLM, Decoder, Layer, Attention, RMSNorm, MixtureOfExperts, DenseFeedForward, Router, Experts}
_COMPUTED |= {OutputHead, nn.Embedding, Linear, nn.ModuleList}
"""Types of modules, not those derived from them, whose computation the native step knows."""

DecodingStep = Callable[[Tensor], Tensor]
"""From the next tokens of each text, [B, Q], to the logits [B, V] that follow the last of them, in fp32; the cache
takes the tokens."""

_FEW_ROWS, _MOST_VALUES = 64, 2**17
"""Tokens at once that always go through the native step, and the hidden values of those that still do: these are read
again for every few columns of weights, so they have to stay in a core's cache."""


def decoding_step(model: CausalLM, cache: KeyValueCache) -> DecodingStep:
    """The fastest step that takes this model, with its weights as they are now."""
    return _native_step(model, cache) or plain_step(model, cache)


def plain_step(model: CausalLM, cache: KeyValueCache) -> DecodingStep:
    """The model's own forward; the reference."""

    def step(id_BQ: Tensor) -> Tensor:
        hidden_BSD = model(id_BQ, cache=cache).hidden_BSD
        return model.logits(hidden_BSD[:, -1]).float()

    return step


def _native_step(model: CausalLM, cache: KeyValueCache) -> DecodingStep | None:
    """Null where a module is not just what the native step computes (adapters, say), or a tensor not where it reads."""
    if not all(type(module) in _COMPUTED for module in model.modules()):
        return None
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not all(type(mixture.dispatcher) is LocalDispatcher for mixture in mixtures):
        return None
    routers = {id(mixture.gate.weight) for mixture in mixtures}
    weights = [weight for weight in model.parameters() if id(weight) not in routers]
    if not native.supports(*weights, *itertools.chain(*map(cache.of_layer, range(len(model.model.layers))))):
        return None
    decoding, plain = _native_decoding(model, cache), plain_step(model, cache)

    def step(id_BQ: Tensor) -> Tensor:
        if id_BQ.numel() > max(_FEW_ROWS, _MOST_VALUES // model.config.hidden_size):
            return plain(id_BQ)
        logits_BV = decoding.step(id_BQ, cache.length)
        cache.length += id_BQ.shape[1]
        return logits_BV

    return step


def _native_decoding(model: CausalLM, cache: KeyValueCache) -> NativeDecoding:
    config, decoder = model.config, model.model
    position_1S = torch.arange(cache.capacity).unsqueeze(0)
    dtype = model.lm_head.weight.dtype
    cos_1SH, sin_1SH = rotary_angles(position_1S, config.width_of_head, config.rope_theta, dtype)
    common = DecoderTensors(
        decoder.embed_tokens.weight,
        decoder.norm.weight,
        model.lm_head.weight,
        cos_1SH[0].float(),
        sin_1SH[0].float(),
        cache.padding_B,
    )
    layers = [_layer_tensors(layer, *cache.of_layer(index)) for index, layer in enumerate(decoder.layers)]
    experts = config.num_experts_per_tok if config.is_mixture else 1
    return NativeDecoding(layers, common, experts, config.sliding_window, config.rms_norm_eps)


def _layer_tensors(layer: nn.Module, keys_BSGH: Tensor, values_BSGH: Tensor) -> LayerTensors:
    assert isinstance(layer, Layer)
    attention, mlp = layer.self_attn, layer.mlp
    router: Tensor | None = None
    down: Tensor
    if isinstance(mlp, MixtureOfExperts):
        router = mlp.gate.weight.float().contiguous()
        gate, up = mlp.experts.gate_up_proj[0].chunk(2)
        down = mlp.experts.down_proj
    else:
        assert isinstance(mlp, DenseFeedForward)
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.unsqueeze(0)
    return LayerTensors(
        layer.input_layernorm.weight,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        router,
        gate,
        up,
        down,
        keys_BSGH,
        values_BSGH,
    )
