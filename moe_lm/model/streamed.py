"""Logits of a model on disk, one layer in memory at a time: for models that do not fit into memory as a whole."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.kernels.attention import attention_mask
from moe_lm.kernels.normalization import rms_norm
from moe_lm.model.attention import rotary_angles
from moe_lm.model.decoder import Layer
from moe_lm.model.source import ModelSource


@torch.no_grad()
def streamed_logits(source: ModelSource, input_ids_BS: Tensor, nudged: bool = False) -> Tensor:
    """Logits [B, S, V] in fp32 of token ids [B, S], as the whole model would give them: one document per row.

    Memory holds the embedding or the head, or one layer, in fp32, and no more.

    Args:
        source: The model.
        input_ids_BS: Token ids.
        nudged: Whether the embedding's last bits are changed first, to see how much the model amplifies rounding.
    """
    config = source.config
    window, length = config.sliding_window, input_ids_BS.shape[1]
    ones_BS = torch.ones_like(input_ids_BS)
    mask_BST = None if window is None or window >= length else attention_mask(ones_BS, ones_BS, 0, window)
    position_ids_BS = torch.arange(length).expand_as(input_ids_BS)
    rotary = rotary_angles(position_ids_BS, config.width_of_head, config.rope_theta, torch.float32)
    x_BSD = F.embedding(input_ids_BS, source.tensor("model.embed_tokens.weight")).float()
    if nudged:
        nudge(x_BSD)
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer: nn.Module = Layer(config, index)
        prefix = f"model.layers.{index}."
        weights = {name: source.tensor(prefix + name).float() for name, _ in layer.named_parameters()}
        layer.load_state_dict(weights, strict=False, assign=True)
        x_BSD, _ = layer(x_BSD, rotary, mask_BST, None, None)
    x_BSD = rms_norm(x_BSD, source.tensor("model.norm.weight").float(), config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return F.linear(x_BSD, source.tensor(head).float())


def nudge(x_BSD: Tensor) -> None:
    """Change the last bit of every second value, in place: what then becomes of a model's outputs is rounding."""
    x_BSD[..., ::2] *= 1 + 2**-23
