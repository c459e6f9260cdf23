"""The model configuration of somebody else's directory: config.json of Hugging Face, or params.json of Mistral."""

import math
from pathlib import Path
from typing import Any

from moe_lm.errors import InputError
from moe_lm.hf.files import has_consolidated, read_object
from moe_lm.model.config import LoadBalancing, ModelConfig, ModelFamily

_FAMILIES = {"mixtral": ModelFamily.mixture, "mistral": ModelFamily.dense, "llama": ModelFamily.dense}
_REQUIRED = dict.fromkeys(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings".split(),
    int,
) | {"rms_norm_eps": float}
_OPTIONAL = {"head_dim": int, "sliding_window": int, "initializer_range": float, "tie_word_embeddings": bool}
_ROUTING = {"num_local_experts": int, "num_experts_per_tok": int}

_SILENT: dict[str, dict[str, Any]] = {
    "mixtral": {"router_aux_loss_coef": 0.001},
    "mistral": {"sliding_window": 4096},
    "llama": {"rope_theta": 10000.0},
}
"""What transformers takes where the file is silent, and where that is not what moe-lm takes."""

_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
"""What may stand beside the base; `type` is the older name of `rope_type`. Every other key changes the frequencies."""

_PARAMS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
}
"""Names in params.json. The first release of Mixtral has Hugging Face's there."""


def load_config(directory: Path) -> ModelConfig:
    """The model configuration of a directory: Mixtral, Mistral, or Llama, without rope scaling, biases or quantisation.

    Raises:
        InputError: It is of another architecture, or can not be followed.
    """
    if has_consolidated(directory):
        path = directory / "params.json"
        return _configuration(path, *_from_params(path, read_object(path)))
    path = directory / "config.json"
    if not path.exists():
        raise InputError(
            f"{path}: is missing; fetch it again, or give a directory that holds it beside the weights, as those of "
            "Hugging Face do."
        )
    raw = read_object(path)
    kind = _field(path, raw, "model_type", str)
    if kind not in _FAMILIES:
        raise InputError(
            f"{path}: model_type={kind!r} is not supported; mixtral and mistral are, and llama as a dense model; "
            "convert it to one of them, or train with the tool that it was made with."
        )
    _refuse_what_is_not_computed(path, raw)
    if kind == "llama":
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        raw.pop("sliding_window", None)  # it has none, whatever the file holds
    return _configuration(path, {**_SILENT[kind], **raw}, kind)


def _configuration(path: Path, raw: dict[str, Any], kind: str) -> ModelConfig:
    values = {name: _field(path, raw, name, of) for name, of in _REQUIRED.items()}
    values |= {name: _field(path, raw, name, of) for name, of in _OPTIONAL.items() if raw.get(name) is not None}
    values |= {"family": _FAMILIES[kind], "rope_theta": _rope_theta(path, raw)}
    if kind == "mixtral":
        num_experts, num_experts_per_tok = (_field(path, raw, name, of) for name, of in _ROUTING.items())
        values |= {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
        if raw.get("router_aux_loss_coef") is not None:  # of transformers' own loss, which pools layers
            coefficient = _field(path, raw, "router_aux_loss_coef", float)
            values |= {"router_aux_loss_coef": coefficient, "load_balancing": LoadBalancing.pooled}
    try:
        return ModelConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _refuse_what_is_not_computed(path: Path, raw: dict[str, Any]) -> None:
    """Options of the same architectures that change what a model computes, and that moe-lm does not have."""
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act={raw['hidden_act']!r} is not supported; silu is.")
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise InputError(f"{path}: {name}={raw[name]!r} is not supported; moe-lm has linear maps without biases.")
    if raw.get("per_layer_config"):
        raise InputError(f"{path}: per_layer_config is not supported; all layers of a moe-lm model are alike.")
    if raw.get("quantization_config"):
        raise InputError(
            f"{path}: quantization_config says that the weights are quantised, which is not supported; take the "
            "original ones in bfloat16 or float32."
        )


def _from_params(path: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """params.json under Hugging Face's names, and the kind of model that it is of.

    Where it is silent, what mistral-inference takes counts: a rotary base of 1e6, or 1e4 with a sliding window. The
    longest context stands in no such file of Mistral's; 32768 is that of its models.
    """
    values = {name: raw[old] if old in raw else raw.get(name) for name, old in _PARAMS.items()}
    values |= {name: raw.get(name) for name in ("vocab_size", "head_dim", "rope_theta", "sliding_window")}
    if isinstance(values["sliding_window"], str) and values["sliding_window"].isdecimal():
        values["sliding_window"] = int(values["sliding_window"])  # early files have it as text
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["rope_theta"] is None:
        values["rope_theta"] = 1e6 if values["sliding_window"] is None else 1e4
    if values["max_position_embeddings"] is None:
        values["max_position_embeddings"] = 32768
    for name in ("lora", "vision_encoder", "quantization", "yarn", "rope_scaling", "q_lora_rank"):
        if raw.get(name):
            raise InputError(f"{path}: {name} is not supported; mixtures and dense models of text alone are.")
    values["tie_word_embeddings"] = raw.get("tied_embeddings")
    moe = raw.get("moe") or {name: raw[name] for name in ("num_local_experts", "num_experts_per_tok") if name in raw}
    if not isinstance(moe, dict):
        raise InputError(f"{path}: moe={moe!r} is not a JSON object.")
    if not moe:
        return values, "mistral"
    values["num_local_experts"] = moe.get("num_experts", moe.get("num_local_experts"))
    return {**values, "num_experts_per_tok": moe.get("num_experts_per_tok")}, "mixtral"


def _rope_theta(path: Path, raw: dict[str, Any]) -> float:
    """The base of the rotary frequencies: in `rope_parameters`, or (before transformers 5) a field of its own."""
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta")}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters={rope!r} is not a JSON object.")
    beside = {name: raw[name] or None for name in ("rope_scaling", "partial_rotary_factor") if name in raw}
    for name, value in {**beside, **rope}.items():
        if name != "rope_theta" and value is not None and value != _PLAIN_ROPE.get(name):
            raise InputError(
                f"{path}: rope scaling is not supported, nor another rotary embedding ({name}={value!r}); take a model "
                "without it."
            )
    return _field(path, rope, "rope_theta", float)


def _field(path: Path, raw: dict[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    if value is None:
        raise InputError(f"{path}: {name} is missing; add it, or fetch the file again.")
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(
            f"{path}: {name}={value!r} is not of type {kind.__name__}; correct it, or fetch the file again."
        )
    return value
