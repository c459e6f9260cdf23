"""Read a Hugging Face directory of the layout that `export` writes into a native model. Only safetensors, no code."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lm.errors import InputError
from moe_lm.hf.layout import to_disk
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM

_FAMILIES = {"mixtral": ModelFamily.mixture, "mistral": ModelFamily.dense}
_REQUIRED = dict.fromkeys(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings".split(),
    int,
) | {"rms_norm_eps": float}
_OPTIONAL = {"head_dim": int, "sliding_window": int, "initializer_range": float, "tie_word_embeddings": bool}
_ROUTING = {"num_local_experts": int, "num_experts_per_tok": int}

_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")


def load_config(directory: Path) -> ModelConfig:
    """The model configuration of a Hugging Face directory; Mixtral and Mistral, without rope scaling."""
    path = directory / "config.json"
    raw = _read_object(path)
    kind = raw.get("model_type")
    if kind not in ("mixtral", "mistral"):
        raise InputError(f"{path}: model_type={kind!r} is not supported; mixtral and mistral are.")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act={raw['hidden_act']!r} is not supported; silu is.")
    if kind == "mistral":
        raw.setdefault("sliding_window", 4096)  # what transformers takes where the file is silent
    values = {name: _field(path, raw, name, of) for name, of in _REQUIRED.items()}
    values |= {name: _field(path, raw, name, of) for name, of in _OPTIONAL.items() if raw.get(name) is not None}
    values |= {"family": _FAMILIES[kind], "rope_theta": _rope_theta(path, raw)}
    if kind == "mixtral":
        num_experts, num_experts_per_tok = (_field(path, raw, name, of) for name, of in _ROUTING.items())
        values |= {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    try:
        return ModelConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _rope_theta(path: Path, raw: dict[str, Any]) -> float:
    """The base of the rotary frequencies: in `rope_parameters`, or (before transformers 5) a field of its own."""
    rope = raw.get("rope_parameters") or raw
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters={rope!r} is not a JSON object.")
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        raise InputError(f"{path}: rope scaling is not supported.")
    return _field(path, rope, "rope_theta", float)


def _field(path: Path, raw: dict[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    if value is None:
        raise InputError(f"{path}: {name} is missing.")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{path}: {name}={value!r} is not of type {kind.__name__}.")
    return value


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
        _fill(directory / file, {name: slots[name] for name in names})
    return model


def _fill(path: Path, slots: dict[str, Tensor]) -> None:
    """Copy tensors of one file into the slots of their names."""
    try:
        with safe_open(path, framework="pt") as reader:
            for name, slot in slots.items():
                tensor = reader.get_tensor(name)
                if tensor.shape != slot.shape:
                    shapes = f"{list(tensor.shape)}, and config.json asks for {list(slot.shape)}"
                    raise InputError(f"{path}: {name} has shape {shapes}.")
                if not tensor.is_floating_point():
                    raise InputError(f"{path}: {name} is {tensor.dtype}; quantised weights are not supported.")
                slot.copy_(tensor)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: can not be read ({error}).") from error


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name → file, from the index or from the one file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: weight_map is missing.")
        for file in weight_map.values():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise InputError(f"{index}: {file!r} is not the name of a safetensors file in this directory.")
        return weight_map
    single = "model.safetensors"
    try:
        with safe_open(directory / single, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), single)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory / single}: can not be read ({error}).") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can not be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object.")
    return value
