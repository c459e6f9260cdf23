"""Initial weights, a function of seed and parameter name: the same whatever is built first, or on which process.

(On one kind of device: a GPU draws other numbers from the same seed than a CPU.)
"""

import hashlib
import math

import torch

from moe_lm.model.decoder import CausalLM

_RESIDUAL_WRITERS = ("o_proj.weight", "down_proj", "down_proj.weight")


@torch.no_grad()
def initialize(model: CausalLM, seed: int) -> None:
    """Fill every parameter: norms with 1, matrices with N(0, initializer_range²).

    Matrices that write into the residual stream are smaller by sqrt(2·layers), so that its variance does not grow with
    depth (GPT-2, Radford et al. 2019, section 2.3).
    """
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        scale = 1 / math.sqrt(2 * model.config.num_hidden_layers) if name.endswith(_RESIDUAL_WRITERS) else 1.0
        parameter.normal_(0.0, std * scale, generator=generator)
