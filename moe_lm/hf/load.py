"""Read a Hugging Face directory of the layout that `export` writes into a native model. Only safetensors, no code."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe_lm.errors import InputError
from moe_lm.hf.layout import to_disk
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM

_SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps initializer_range sliding_window tie_word_embeddings"
).split()


def load_config(directory: Path) -> ModelConfig:
    """The model configuration of a Hugging Face directory; Mixtral and Mistral, without rope scaling."""
    raw = _read_json(directory / "config.json")
    families = {"mixtral": ModelFamily.mixture, "mistral": ModelFamily.dense}
    kind = raw.get("model_type")
    if kind not in families:
        raise InputError(f"{directory}/config.json: model_type={kind!r} is not supported; mixtral and mistral are.")
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta", 1e4), "rope_type": "default"}
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        raise InputError(f"{directory}/config.json: rope scaling is not supported.")
    values: dict[str, Any] = {name: raw[name] for name in _SAME if name in raw}
    values |= {"family": families[kind], "rope_theta": float(rope["rope_theta"])}
    if kind == "mixtral":
        values |= {"num_experts": raw["num_local_experts"], "num_experts_per_tok": raw["num_experts_per_tok"]}
    return ModelConfig(**values)


@torch.no_grad()
def load_model(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Build the model and fill every parameter from the directory's files; every tensor must be accounted for."""
    with torch.device("meta"):
        model = CausalLM(config)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.to(dtype)
    # Parameters under their names on disk: views of the stacked tensors, so that reading fills the model itself.
    slots = dict(to_disk(model.named_parameters()))
    wanted = defaultdict(list)
    for name, file in _weight_map(directory).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in slots:
            raise InputError(f"{directory}: the tensor {name} does not belong to the model of its config.json.")
        wanted[file].append(name)
    found = {name for names in wanted.values() for name in names}
    if missing := sorted(set(slots) - found):
        raise InputError(f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}.")
    for file, names in wanted.items():
        with safe_open(directory / file, framework="pt") as reader:
            for name in names:
                tensor = reader.get_tensor(name)
                if tensor.shape != slots[name].shape:
                    shapes = f"{list(tensor.shape)}, and config.json asks for {list(slots[name].shape)}"
                    raise InputError(f"{directory}/{file}: {name} has shape {shapes}.")
                slots[name].copy_(tensor)
    return model


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name → file, from the index or from the one file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index)["weight_map"]
        for file in weight_map.values():
            if Path(file).name != file:
                raise InputError(f"{index}: {file!r} is not the name of a file in this directory.")
        return weight_map
    single = "model.safetensors"
    try:
        with safe_open(directory / single, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), single)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory / single}: can not be read ({error}).") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can not be read as JSON ({error}).") from error
