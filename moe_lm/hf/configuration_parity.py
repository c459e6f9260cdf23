"""Whether config.json says the model that is meant, read by moe-lm and by transformers, and where generation ends."""

from pathlib import Path
from typing import Any

from moe_lm.hf.layout import model_type, to_hf_config
from moe_lm.hf.model_configuration import load_config
from moe_lm.hf.receipt import Check, VerificationError
from moe_lm.hf.silence import quiet_transformers
from moe_lm.hf.tokenizer_parity import TextTokenizer
from moe_lm.model.config import ModelConfig

_SHAPE = (
    "family vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "width_of_head max_position_embeddings rope_theta rms_norm_eps sliding_window tie_word_embeddings"
).split()
_ROUTING = ["num_experts", "num_experts_per_tok"]
"""Fields that decide what a model computes."""

_ONLY = {"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0, "attention_bias": False}
"""Fields of transformers' configurations, some of which each has, and the value that moe-lm's models have."""


def their_config(directory: Path) -> Any:
    """The configuration as transformers reads it; `VerificationError` where it can not."""
    from transformers import AutoConfig

    with quiet_transformers():
        try:
            return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever a damaged file makes of its readers
            raise VerificationError("configuration", f"transformers can not read config.json ({error})") from error


def check_configuration(directory: Path, config: ModelConfig, tokenizer: TextTokenizer) -> Check:
    """config.json says this model, by our reading and by transformers'; its marks are the tokenizer's."""
    ours = load_config(directory)
    for name in [*_SHAPE, *(_ROUTING if config.is_mixture else [])]:
        if (found := getattr(ours, name)) != (meant := getattr(config, name)):
            found, meant = (getattr(value, "value", value) for value in (found, meant))
            raise VerificationError("configuration", f"{name} is {found} in config.json, and {meant} is meant")
    meant_values = {**to_hf_config(config), "model_type": model_type(config), **token_ids(tokenizer)}
    check = _check_their_configuration(directory, config, meant_values)
    _check_generation(directory, tokenizer)
    return check


def check_reading(directory: Path, config: ModelConfig) -> Check:
    """Transformers reads the model from config.json that moe-lm reads there."""
    return _check_their_configuration(directory, config, to_hf_config(config))


def _check_their_configuration(directory: Path, config: ModelConfig, meant_values: dict[str, Any]) -> Check:
    theirs = their_config(directory)
    meant_values = {**meant_values, **{name: value for name, value in _ONLY.items() if hasattr(theirs, name)}}
    for name, meant in meant_values.items():
        found = getattr(theirs, name, None)
        if name == "head_dim" and found is None:  # its classes then divide, as ours do
            continue
        if name == "sliding_window" and theirs.model_type == "llama":  # a field that its classes do not look at
            continue
        if isinstance(meant, dict):
            found = {key: found.get(key) for key in meant} if isinstance(found, dict) else found
        if found != meant:
            raise VerificationError("configuration", f"{name} is {found} by transformers, and {meant} is meant")
    kind = f"{config.num_experts} experts, {config.num_experts_per_tok} per token" if config.is_mixture else "dense"
    return Check("configuration", f"{theirs.model_type}, {kind}: {len(meant_values)} fields as transformers reads them")


def _check_generation(directory: Path, tokenizer: TextTokenizer) -> None:
    """generation_config.json ends a text where the tokenizer does."""
    from transformers import GenerationConfig

    with quiet_transformers():
        try:
            defaults = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # whatever a damaged file makes of its reader
            raise VerificationError("configuration", f"generation_config.json can not be read ({error})") from error
    for name, meant in generation_ids(tokenizer).items():
        if (found := getattr(defaults, name)) != meant:
            raise VerificationError("configuration", f"{name} is {found} in generation_config.json, not {meant}")


def token_ids(tokenizer: TextTokenizer) -> dict[str, int]:
    """The tokenizer's marks by transformers' names."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def generation_ids(tokenizer: TextTokenizer) -> dict[str, int | list[int]]:
    """The same for generation, which may end at several."""
    ends = tokenizer.end_ids
    return token_ids(tokenizer) | ({"eos_token_id": ends} if len(ends) > 1 else {})
