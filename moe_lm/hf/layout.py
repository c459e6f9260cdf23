"""Names and shapes: the decoder in memory ↔ a model directory on disk.

In memory our names are transformers' own. On disk Mixtral has one matrix per expert
(`block_sparse_moe.experts.N.w1/w2/w3`), the layout that vLLM and llama.cpp read and that transformers converts from;
Mistral and Llama (our dense family) are the same in both places. That is what is written. Two others are read as well:
`fused`, transformers' own names of stacked experts, and `consolidated`, Mistral's own files.

Each layout is a function from a native parameter to the tensors on disk that it is made of, each as a view into the
parameter. So reading is copying into the views, writing is copying out of them, and there is nothing to assemble.
"""

import enum
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from moe_lm.model.config import LoadBalancing, ModelConfig, ModelFamily

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


class Layout(enum.Enum):
    """How a directory names and cuts up its tensors."""

    per_expert = "Hugging Face's matrices"
    fused = "Hugging Face's names of stacked experts"
    consolidated = "Mistral's consolidated files"
    consolidated_stacked = "Mistral's first consolidated files, experts stacked"


class Slot(NamedTuple):
    """A tensor on disk, and its place in a native parameter."""

    name: str
    shape: list[int]
    """On disk."""
    view: Tensor
    """Of the native parameter; its values, in their order, are those of the tensor on disk."""


def layout_of(names: Iterable[str], consolidated: bool) -> Layout:
    """The layout that these names on disk are in.

    Args:
        names: Of all tensors.
        consolidated: Whether they are from Mistral's own files.
    """
    if consolidated:
        stacked = any(name.endswith(".block_sparse_moe.w1") for name in names)
        return Layout.consolidated_stacked if stacked else Layout.consolidated
    return Layout.fused if any(_EXPERTS.fullmatch(name) for name in names) else Layout.per_expert


def slots(name: str, parameter: Tensor, layout: Layout, config: ModelConfig) -> list[Slot]:
    """The tensors on disk that one native parameter is made of."""
    if layout is Layout.fused:
        return [Slot(name, list(parameter.shape), parameter)]
    if layout is Layout.per_expert:
        return [Slot(disk, list(view.shape), view) for disk, view in to_disk([(name, parameter)])]
    views = _consolidated(name, parameter, layout, config)
    # A view of more dimensions than a matrix is one of its rows in another order.
    return [
        Slot(disk, [math.prod(view.shape[:-1]), view.shape[-1]] if view.dim() > 1 else list(view.shape), view)
        for disk, view in views
    ]


_CONSOLIDATED_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}


def _consolidated(name: str, parameter: Tensor, layout: Layout, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and views in Mistral's own layout (mistral-inference, `transformer.py` and `moe.py`).

    Its rotary embedding turns neighbouring rows of q and k against each other, transformers' (and ours) row i of a
    head against row i + H/2: the rows are interleaved there, and in halves here.
    """
    match = re.fullmatch(r"model\.(layers\.\d+\.)(.+)", name)
    layer, of_layer = (match[1], match[2]) if match else ("", name)
    if of_layer in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        parameter = parameter.unflatten(0, (-1, 2, config.width_of_head // 2)).transpose(1, 2)
    if of_layer in _CONSOLIDATED_NAMES:
        yield layer + _CONSOLIDATED_NAMES[of_layer], parameter
        return
    stacked = layout is Layout.consolidated_stacked
    block = f"{layer}{'block_sparse_moe' if stacked else 'feed_forward'}"
    if of_layer == "mlp.gate.weight":
        yield f"{block}.gate.weight", parameter
    elif stacked:  # w2 is stored as its own transpose, so that all three are [E·F, D]
        down = of_layer == "mlp.experts.down_proj"
        matrices = [("w2", parameter.transpose(1, 2))] if down else zip(("w1", "w3"), parameter.chunk(2, dim=1))
        yield from ((f"{block}.{matrix}", view) for matrix, view in matrices)
    else:
        for disk, view in to_disk([(name, parameter)]):
            yield f"{block}.{disk.partition('.block_sparse_moe.')[2]}", view


def is_derived(name: str) -> bool:
    """Whether a tensor on disk is computed from the configuration, so that it is of no use here: old files of Llama
    hold the frequencies of the rotary embedding.
    """
    return name.endswith(".rotary_emb.inv_freq")


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
        values["router_aux_loss_coef"] = config.router_aux_loss_coef * _pooled_share(config)
    return values


def _pooled_share(config: ModelConfig) -> float:
    """What transformers' load-balancing loss, K at balance, has to be multiplied with to weigh as the model's own."""
    if config.load_balancing is LoadBalancing.none:
        return 0.0
    return 1.0 if config.load_balancing is LoadBalancing.pooled else 1 / config.num_experts_per_tok


def model_type(config: ModelConfig) -> str:
    """Transformers' name of the architecture."""
    return "mixtral" if config.family is ModelFamily.mixture else "mistral"
