"""Adapters as peft's files.

peft keeps the adapters of stacked experts as two plain matrices (0.21, `ParamWrapper`): A [r·E, in], the experts one
below the other; B [out, r·E], in which the number of the expert runs fastest. Of the two stacks of one module the first
is nested: `experts.base_layer.lora_A` is that of `gate_up_proj`, `experts.lora_A` that of `down_proj`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.tensor_file import write_tensors
from moe_lm.errors import RunError
from moe_lm.files import write_json
from moe_lm.finetune.config import FinetuneConfig, Part
from moe_lm.finetune.lora import EMBEDDING, A
from moe_lm.model.config import ModelConfig
from moe_lm.training.state import MODEL

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_DENSE = ["gate_proj", "up_proj", "down_proj"]


def write_adapter(
    directory: Path, checkpoint: Checkpoint, model: ModelConfig, config: FinetuneConfig, base: str
) -> None:
    """Write a checkpoint's adapters as peft's `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        directory: An empty one.
        checkpoint: Holds the adapters.
        model: The base's configuration.
        config: How they were trained.
        base: What peft shall load them on, a directory in Hugging Face's layout or a name on the Hub.
    """
    names = (key.removeprefix(MODEL) for key in checkpoint.kinds(MODEL))
    tensors = {peft_name(name): to_peft(name, checkpoint.tensor(MODEL + name)) for name in names}
    write_tensors(directory / WEIGHTS_FILE, tensors)
    write_json(directory / CONFIG_FILE, peft_config(model, config, base))
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as written:
        names_there = set(written.keys())
        if names_there != set(tensors) or not all(torch.equal(written.get_tensor(n), t) for n, t in tensors.items()):
            raise RunError(f"{directory / WEIGHTS_FILE}: does not hold the adapters that were written; try again")


def peft_name(name: str) -> str:
    """An adapter's parameter as peft names it."""
    stem, matrix = name[: -len("lora_A")], name[-len("lora_A") :]
    stem = stem.replace("experts.gate_up_proj_", "experts.base_layer.").replace("experts.down_proj_", "experts.")
    if EMBEDDING in stem:
        return f"base_model.model.{stem}{matrix.replace('lora_', 'lora_embedding_')}"
    return f"base_model.model.{stem}{matrix}.weight"


def to_peft(name: str, matrix: Tensor) -> Tensor:
    """An adapter's matrix as peft stores it; those of stacked experts become plain matrices."""
    if matrix.dim() == 2:
        return matrix
    if name.endswith(A):
        return matrix.flatten(0, 1)  # [E, r, in] → [E·r, in]
    return matrix.permute(1, 2, 0).flatten(1)  # [E, out, r] → [out, r·E]


def peft_config(model: ModelConfig, config: FinetuneConfig, base: str) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    parts = config.chosen_parts
    modules = list(_ATTENTION) if Part.attention in parts else []
    modules += ["embed_tokens"] if Part.embedding in parts else []
    modules += ["lm_head"] if Part.head in parts else []
    parameters: list[str] = []
    if Part.experts in parts and model.is_mixture:
        parameters += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    elif Part.experts in parts:
        modules += _DENSE
    if Part.router in parts and model.is_mixture:
        parameters.append("mlp.gate.weight")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }
