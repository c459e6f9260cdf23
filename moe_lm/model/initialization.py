"""Initial weights, a function of seed and parameter name: the same whatever is built first, or on which process.

(On one kind of device: a GPU draws other numbers from the same seed than a CPU.)
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM

_RESIDUAL_WRITERS = ("o_proj.weight", "down_proj", "down_proj.weight")


def generator_of(seed: int, name: str, device: torch.device) -> torch.Generator:
    """The source of one parameter's random numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def initial_value(
    config: ModelConfig, seed: int, name: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The whole of one parameter: norms are 1, matrices N(0, initializer_range²).

    Matrices that write into the residual stream are smaller by sqrt(2·layers), so that its variance does not grow with
    depth (GPT-2, Radford et al. 2019, section 2.3).
    """
    value = torch.empty(*shape, device=device, dtype=dtype)
    if value.dim() == 1:
        return value.fill_(1.0)
    scale = 1 / math.sqrt(2 * config.num_hidden_layers) if name.endswith(_RESIDUAL_WRITERS) else 1.0
    return value.normal_(0.0, config.initializer_range * scale, generator=generator_of(seed, name, device))


@torch.no_grad()
def initialize(model: CausalLM, seed: int) -> None:
    """Fill every parameter of a whole model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model.config, seed, name, parameter.shape, parameter.device, parameter.dtype))
