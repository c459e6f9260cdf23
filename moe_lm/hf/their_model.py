"""A model as the installed transformers runs it: put together by its own conversion, into its own classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lm.hf.receipt import VerificationError
from moe_lm.hf.silence import quiet_transformers


class DiskModel(NamedTuple):
    """A model as transformers is given it."""

    config: Any
    """Its PretrainedConfig."""
    read: Callable[[str], dict[str, Tensor]]
    """Reads the tensors on disk whose names begin with a text."""
    directory: Path | None
    """Where the whole model lies in files; null where it does not."""


def load_theirs(check: str, config: Any, weights: Path | dict[str, Tensor], prefix: str) -> Any:
    """Transformers' model in fp32 with its plainest kernels, each part of it filled.

    Args:
        check: Name of the check, for a finding.
        config: A PretrainedConfig.
        weights: A directory, or tensors under their names on disk.
        prefix: Of a layer's names on disk, where it stands as layer 0; else empty.

    Raises:
        VerificationError: It can not be loaded, or a part of it is not filled.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "output_loading_info": True,
        **({"experts_implementation": "eager"} if hasattr(config, "num_local_experts") else {}),
    }
    with quiet_transformers():
        try:
            if isinstance(weights, Path):
                options |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
                model, report = AutoModelForCausalLM.from_pretrained(weights, **options)
            else:
                options |= {"config": config, "state_dict": weights}
                model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, **options)
        except Exception as error:  # whatever its conversion makes of tensors that it can not put together
            where = f"{prefix}*: " if prefix else ""
            raise VerificationError(check, f"{where}transformers can not load it ({_first_line(error)})") from error
    for what, names in report.items():
        if names:
            first = str(sorted(map(str, names))[0]).replace("model.layers.0.", prefix or "model.layers.0.")
            raise VerificationError(check, f"{first}: transformers reports {what.replace('_', ' ')}")
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
