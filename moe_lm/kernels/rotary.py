"""Rotary position embedding, half rotation as in transformers' Mixtral; the plain version only.

Three hand-written CPU versions were measured in bf16 (addcmul on halves, rotation as a matrix product, roll): from 1.4×
faster with head_dim 64 to 1.5× slower with 32, where halves are too short to vectorise.
"""

import torch
from torch import Tensor


def apply_rotary(x_BSNH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin, the same angles for every head (Su et al. 2021, equation 34, in half layout)."""
    first, second = x_BSNH.chunk(2, dim=-1)
    return x_BSNH * cos_BSH.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin_BSH.unsqueeze(2)
