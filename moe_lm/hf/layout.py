"""Names and shapes: the decoder in memory ↔ a Hugging Face directory on disk.

In memory our names are transformers' own. On disk Mixtral has one matrix per expert
(`block_sparse_moe.experts.N.w1/w2/w3`), the layout that vLLM and llama.cpp read and that transformers converts from;
Mistral (our dense family) is the same in both places.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from moe_lm.model.config import ModelConfig, ModelFamily

_EXPERTS = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_GATE = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")


def to_disk(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Native tensors to the layout on disk, one at a time; stacked experts become views of their single matrices."""
    for name, tensor in tensors:
        if match := _GATE.fullmatch(name):
            yield f"{match[1]}.block_sparse_moe.gate.weight", tensor
        elif match := _EXPERTS.fullmatch(name):
            for expert, matrix in enumerate(tensor):
                prefix = f"{match[1]}.block_sparse_moe.experts.{expert}"
                if match[2] == "down_proj":
                    yield f"{prefix}.w2.weight", matrix
                else:
                    gate, up = matrix.chunk(2)
                    yield f"{prefix}.w1.weight", gate
                    yield f"{prefix}.w3.weight", up
        else:
            yield name, tensor


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Arguments of transformers' MixtralConfig or MistralConfig for this model."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps initializer_range sliding_window tie_word_embeddings"
    ).split()
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    values["head_dim"] = config.width_of_head
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.is_mixture:
        values["num_local_experts"] = config.num_experts
        values["num_experts_per_tok"] = config.num_experts_per_tok
        values["router_aux_loss_coef"] = config.router_aux_loss_coef
    return values


def model_type(config: ModelConfig) -> str:
    """Transformers' name of the architecture."""
    return "mixtral" if config.family is ModelFamily.mixture else "mistral"
