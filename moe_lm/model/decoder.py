"""The decoder: embedding, layers, final norm, output head. It knows nothing of training, data or processes.

It returns hidden states and routing statistics; the loss works from hidden states in chunks, so logits of a whole batch
never exist in training. Parameter names and shapes are those of transformers' Mixtral (or Mistral) in memory.

Letters: B batch, S sequence, T key length, D hidden, V vocabulary, L layers, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.kernels.attention import attention_mask
from moe_lm.kernels.documents import PackedDocuments, packed_documents, takes_packed
from moe_lm.kernels.normalization import rms_norm
from moe_lm.model.attention import Attention, KeyValueCache, rotary_angles
from moe_lm.model.config import ModelConfig, Recompute
from moe_lm.model.moe import DenseFeedForward, MixtureOfExperts
from moe_lm.model.recompute import recompute_in_backward
from moe_lm.model.router import RoutingStatistics
from moe_lm.transfer import copied_to


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension in fp32; same shape and type out."""
        return rms_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.is_mixture else DenseFeedForward(config)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | PackedDocuments | None,
        routing_mask_BS: Tensor | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """X [B, S, D] to [B, S, D], and the statistics of the layer's router, if there is no cache."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, visible, cache)
        y_BSD, statistics = self.mlp(self.post_attention_layernorm(x_BSD), routing_mask_BS, cache is None)
        return x_BSD + y_BSD, statistics


class DecoderOutput(NamedTuple):
    """What a forward pass gives."""

    hidden_BSD: Tensor
    """Final hidden states, normalised; `OutputHead.factors` says what they are multiplied with."""
    statistics: RoutingStatistics | None
    """Every layer's routing statistics, stacked: [L, E] of what is by expert, [L] of what is one number. Null of a
    dense model, or with a cache."""


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute = Recompute.none
        """Activation checkpointing: what backward computes again of each layer."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        routing_mask_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> DecoderOutput:
        """Run the layers.

        Args:
            input_ids_BS: token ids, int64.
            position_ids_BS: positions for the rotary embedding; null takes the cache's, or counts from 0.
            document_ids_BS: attention stays within tokens of equal document id, which lie side by side; null means one
                document per row. They may be on the host wherever the model is: a GPU is then not waited for.
            routing_mask_BS: true for tokens that count in the routing statistics; null means all.
            cache: keys and values of earlier tokens; extended in place. Its rows are documents, and nothing is counted.
        """
        config, length = self.config, input_ids_BS.shape[1]
        x_BSD: Tensor = self.embed_tokens(input_ids_BS)
        visible: Tensor | PackedDocuments | None
        if cache is not None:
            assert document_ids_BS is None and routing_mask_BS is None
            position_ids_BS = cache.position_ids_BT[:, cache.length : cache.length + length]
            visible = self._mask_of_cache(cache, length)
        else:
            if position_ids_BS is None:
                position_ids_BS = torch.arange(length, device=input_ids_BS.device).expand_as(input_ids_BS)
            visible = self._visible(x_BSD, document_ids_BS)
        rotary = rotary_angles(position_ids_BS, config.width_of_head, config.rope_theta, x_BSD.dtype)
        statistics = []
        for layer in self.layers:
            run = recompute_in_backward(layer, self.recompute) if torch.is_grad_enabled() else layer
            x_BSD, of_layer = run(x_BSD, rotary, visible, routing_mask_BS, cache)
            statistics.append(of_layer)
        if cache is not None:
            cache.length += length
            return DecoderOutput(self.norm(x_BSD), None)
        stacked = RoutingStatistics(*map(torch.stack, zip(*statistics))) if config.is_mixture else None
        return DecoderOutput(self.norm(x_BSD), stacked)

    def _visible(self, x_BSD: Tensor, document_ids_BS: Tensor | None) -> Tensor | PackedDocuments | None:
        """Where attention may look: [B, S, S], or documents; null where plain causal attention says the same."""
        (B, S, _), window = x_BSD.shape, self.config.sliding_window
        if document_ids_BS is None and (window is None or window >= S):
            return None
        if takes_packed(x_BSD, self.config.width_of_head):
            return packed_documents(document_ids_BS, (B, S), x_BSD.device, window)
        if document_ids_BS is None:
            document_ids_BS = torch.ones(B, S, dtype=torch.int64, device=x_BSD.device)
        document_ids_BS = copied_to(document_ids_BS, x_BSD.device)
        return attention_mask(document_ids_BS, document_ids_BS, 0, window)

    def _mask_of_cache(self, cache: KeyValueCache, length: int) -> Tensor | None:
        """Where the next tokens of a cache may look, [B, S, T]; null where plain causal attention says the same."""
        window, keys = self.config.sliding_window, cache.length + length
        if not cache.is_padded and length in (1, keys) and (window is None or window >= keys):
            return None
        document_ids_BT = cache.document_ids_BT[:, :keys]
        return attention_mask(document_ids_BT[:, cache.length :], document_ids_BT, cache.length, window)


class OutputHead(nn.Linear):
    """The output head. Losses multiply chunk by chunk, so it gives the factors instead of the product."""

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """X [..., D'] and W [V, D'] whose product x·Wᵀ are the logits of hidden states [..., D]."""
        return hidden, self.weight


class CausalLM(nn.Module):
    """The decoder with its output head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        routing_mask_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> DecoderOutput:
        """Hidden states and statistics, not logits: see `Decoder.forward`, and `logits` for the few that sampling
        needs.
        """
        return self.model(input_ids_BS, position_ids_BS, document_ids_BS, routing_mask_BS, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return F.linear(*self.lm_head.factors(hidden))
