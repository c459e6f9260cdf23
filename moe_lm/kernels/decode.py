"""One step of decoding in native code: the next token of every text through the whole decoder, in one call.

The plain step is some three hundred operators, each of which starts in microseconds; where texts are few they take
longer than reading the weights, which is all that a step has to do. (Measured: docs/performance.md, "Generation".)

Letters: B texts, Q new tokens of each, S capacity of the cache, D hidden, N heads, G key/value heads, H head width, E
experts, F intermediate, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.kernels import native


class LayerTensors(NamedTuple):
    """A layer's weights and cache: the fields of `Weights` in decode.inc, in its order."""

    input_norm_D: Tensor
    q_proj: Tensor
    """[N·H, D]"""
    k_proj: Tensor
    """[G·H, D]"""
    v_proj: Tensor
    """[G·H, D]"""
    o_proj: Tensor
    """[D, N·H]"""
    post_attention_norm_D: Tensor
    router_ED: Tensor | None
    """fp32; null for a dense layer, which has one expert."""
    gate_proj: Tensor
    """[F, D] of the first expert; those of the next one are 2·F·D values behind."""
    up_proj: Tensor
    """[F, D], likewise."""
    down_proj: Tensor
    """[E, D, F]"""
    keys_BSGH: Tensor
    values_BSGH: Tensor


class DecoderTensors(NamedTuple):
    """What the layers have in common."""

    embedding_VD: Tensor
    final_norm_D: Tensor
    head_VD: Tensor
    cos_SH: Tensor
    """Of the rotary embedding, by position; in fp32, rounded to the weights' type."""
    sin_SH: Tensor
    padding_B: Tensor
    """Places in front of each text's first token, int64."""


class Sizes(NamedTuple):
    """The fields of `Sizes` in decode.inc, in its order."""

    B: int
    Q: int
    D: int
    N: int
    G: int
    H: int
    E: int
    experts_per_token: int
    F: int
    V: int
    S: int
    num_layers: int
    length: int
    """Places of the cache that are taken."""
    window: int
    """Latest tokens that attention sees, itself included."""
    tiles: bool
    """Whether there are Intel's matrix tiles."""


class NativeDecoding:
    """Decodes token after token with weights and a cache that stay where they are in memory."""

    def __init__(
        self,
        layers: Sequence[LayerTensors],
        common: DecoderTensors,
        experts_per_token: int,
        sliding_window: int | None,
        eps: float,
    ):
        """Note where everything is.

        Args:
            layers: all of one type and contiguous, as `native.supports` says, but the routers.
            common: likewise, but what is said to be otherwise.
            experts_per_token: 1 for dense layers.
            sliding_window: null for none.
            eps: of the norms.
        """
        self._common, self._eps = common, eps
        self._kept = layers  # native code has their addresses alone
        addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in layer] for layer in layers]
        self._layers_at = torch.tensor(addresses, dtype=torch.int64)
        first, (V, D) = layers[0], common.head_VD.shape
        B, S, G, H = first.keys_BSGH.shape
        E, _, F = first.down_proj.shape
        window = S if sliding_window is None else sliding_window
        tiles = native.has_amx() and common.head_VD.dtype is torch.bfloat16
        N = len(first.q_proj) // H
        self._sizes = Sizes(B, 0, D, N, G, H, E, experts_per_token, F, V, S, len(layers), 0, window, tiles)

    def step(self, id_BQ: Tensor, length: int) -> Tensor:
        """Put tokens behind each text.

        Args:
            id_BQ: token ids, int64.
            length: how many places of the cache are taken; these tokens take the next ones.

        Returns:
            The logits that follow the last of them, [B, V], rounded to the weights' type, in fp32.
        """
        B, Q = id_BQ.shape
        least, most = id_BQ.aminmax()
        assert id_BQ.dtype == torch.int64 and least >= 0 and most < self._sizes.V, (id_BQ.dtype, least, most)
        assert self._sizes.B == B and length + Q <= self._sizes.S, (B, Q, length)
        sizes = torch.tensor(self._sizes._replace(Q=Q, length=length), dtype=torch.int64)
        logits_BV = torch.empty(B, self._sizes.V)
        embedding, norm, head, cos, sin, padding = self._common
        pointers = (sizes, self._layers_at, embedding, norm, head, cos, sin, padding, id_BQ.contiguous(), logits_BV)
        native.run("decode", head.dtype, head.numel(), *pointers, self._eps)
        return logits_BV
