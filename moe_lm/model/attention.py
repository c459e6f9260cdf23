"""Grouped-query self-attention with rotary positions, and the key-value cache that generation uses.

Letters: B batch, S query length, T key length, D hidden, N heads, G key/value heads, H head width.
"""

import torch
from torch import Tensor, nn

from moe_lm.kernels.attention import attention
from moe_lm.kernels.rotary import apply_rotary
from moe_lm.model.config import ModelConfig


def rotary_angles(position_ids_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, H] of RoPE in the half-rotation layout of Hugging Face (RoFormer, Su et al. 2021, eq.
    34).

    Angles are computed in fp32 whatever `dtype`: in bf16 the position 257 would be 256.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids_BS.device, dtype=torch.float32) / head_dim
    angles_BSh = position_ids_BS[..., None].float() * (1.0 / theta**exponents)
    angles_BSH = torch.cat((angles_BSh, angles_BSh), dim=-1)
    return angles_BSH.cos().to(dtype), angles_BSH.sin().to(dtype)


class KeyValueCache:
    """Keys and values of the tokens seen so far, for every layer, in buffers of a fixed capacity.

    `length` is the number of tokens every layer holds; the decoder advances it once per forward.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.width_of_head)
        self.keys_LBTGH = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBTGH = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k_BSGH: Tensor, v_BSGH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values behind those seen; return all of them, [B, length + S, G, H]."""
        end = self.length + k_BSGH.shape[1]
        assert end <= self.keys_LBTGH.shape[2], "the key-value cache is full"
        self.keys_LBTGH[layer, :, self.length : end] = k_BSGH
        self.values_LBTGH[layer, :, self.length : end] = v_BSGH
        return self.keys_LBTGH[layer, :, :end], self.values_LBTGH[layer, :, :end]


class Attention(nn.Module):
    """Mixtral's attention: no biases, rotary positions on queries and keys, G key/value heads shared by N query
    heads.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.width_of_head
        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_BST: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """X [B, S, D] to [B, S, D]; `mask_BST` is true where a query may look, null for plain causal attention."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSNH = apply_rotary(self.q_proj(x_BSD).view(heads), *rotary)
        k_BSGH = apply_rotary(self.k_proj(x_BSD).view(heads), *rotary)
        v_BSGH = self.v_proj(x_BSD).view(heads)
        if cache is not None:
            k_BSGH, v_BSGH = cache.extend(self.layer, k_BSGH, v_BSGH)
        o_BSNH = attention(q_BSNH, k_BSGH, v_BSGH, mask_BST)
        output: Tensor = self.o_proj(o_BSNH.flatten(2))
        return output
