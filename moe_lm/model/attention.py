"""Grouped-query self-attention with rotary positions, and the key-value cache that generation uses.

Letters: B batch, S query length, T key length, D hidden, N heads, G key/value heads, H head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lm.kernels.attention import attention
from moe_lm.kernels.documents import PackedDocuments
from moe_lm.kernels.rotary import apply_rotary
from moe_lm.model.config import ModelConfig
from moe_lm.model.linear import Linear


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

    Each row is one document; shorter ones have padding in front, so that all rows end together. `length` is the number
    of tokens every layer holds; the decoder advances it once per forward.
    """

    def __init__(self, config: ModelConfig, padding_B: Sequence[int], capacity: int, like: Tensor):
        """Reserve the buffers.

        Args:
            config: The model.
            padding_B: Number of padding tokens in front of each row.
            capacity: Most tokens of a row, padding included.
            like: A tensor on the model's device and of its type.
        """
        shape = (len(padding_B), capacity, config.num_key_value_heads, config.width_of_head)
        self._keys_BTGH = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self._values_BTGH = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.capacity = capacity
        self.length = 0
        self.is_padded = any(padding_B)
        self.padding_B = torch.tensor(padding_B, device=like.device)
        place_T, padding_B1 = torch.arange(capacity, device=like.device), self.padding_B.unsqueeze(1)
        self.document_ids_BT = (place_T >= padding_B1).long()
        """1, and 0 for padding."""
        self.position_ids_BT = (place_T - padding_B1).clamp(min=0)

    def extend(self, layer: int, k_BSGH: Tensor, v_BSGH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values behind those seen; return all of them, [B, length + S, G, H]."""
        end = self.length + k_BSGH.shape[1]
        assert end <= self.capacity, "the key-value cache is full"
        keys_BTGH, values_BTGH = self._keys_BTGH[layer], self._values_BTGH[layer]
        keys_BTGH[:, self.length : end] = k_BSGH
        values_BTGH[:, self.length : end] = v_BSGH
        return keys_BTGH[:, :end], values_BTGH[:, :end]

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The buffers of keys and values, [B, capacity, G, H], of which the first `length` places are taken."""
        return self._keys_BTGH[layer], self._values_BTGH[layer]


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
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, key_value_size)
        self.v_proj = Linear(config.hidden_size, key_value_size)
        self.o_proj = Linear(query_size, config.hidden_size)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | PackedDocuments | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """X [B, S, D] to [B, S, D]; `visible` says where a query may look, as in `attention`."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSNH = apply_rotary(self.q_proj(x_BSD).view(heads), *rotary)
        k_BSGH = apply_rotary(self.k_proj(x_BSD).view(heads), *rotary)
        v_BSGH = self.v_proj(x_BSD).view(heads)
        if cache is not None:
            k_BSGH, v_BSGH = cache.extend(self.layer, k_BSGH, v_BSGH)
        o_BSNH = attention(q_BSNH, k_BSGH, v_BSGH, visible)
        output: Tensor = self.o_proj(o_BSNH.flatten(2))
        return output
