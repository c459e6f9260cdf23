"""Where commands take a trained model from: a run directory, one of its checkpoints, or a Hugging Face directory."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.config import to_dataclass
from moe_lm.data.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer
from moe_lm.data.tokenizer_huggingface import TOKENIZER_FILE
from moe_lm.errors import InputError
from moe_lm.hf.export import export
from moe_lm.hf.load import load_config, load_model
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM


@dataclasses.dataclass(frozen=True)
class NativeSource:
    """A checkpoint of a run, with the run's tokenizer."""

    run_directory: Path
    checkpoint: Checkpoint
    config: ModelConfig

    @property
    def tokenizer_directory(self) -> Path:
        """Directory of the tokenizer's files."""
        return self.run_directory / "tokenizer"

    def parameters(self) -> Iterable[tuple[str, Tensor]]:
        """The model's parameters by name, read one at a time."""
        prefix = "model/"
        return ((name.removeprefix(prefix), self.checkpoint.tensor(name)) for name in self.checkpoint.kinds(prefix))


def open_native(path: Path) -> NativeSource:
    """Find and verify the checkpoint that `path` names: a checkpoint itself, or a run's newest."""
    _require_directory(path)
    if (path / "COMPLETE").exists():
        try:
            checkpoint = Checkpoint(path)
        except CheckpointError as error:
            raise InputError(f"checkpoint={path}: {error}.") from error
        run_directory = path.absolute().parent.parent
    else:
        store = CheckpointStore(path / "checkpoints", CheckpointConfig())
        newest = store.newest(refused=lambda reason: print(f"refused checkpoint {reason}", file=sys.stderr))
        if newest is None:
            raise InputError(
                f"checkpoint={path}: holds no complete checkpoint; give a run directory or a step-… directory."
            )
        checkpoint, run_directory = newest, path
    if "config" not in checkpoint.state:
        raise InputError(f"checkpoint={path}: was not written by a run of moe-lm; its state.json has no config.")
    return NativeSource(run_directory, checkpoint, to_dataclass(ModelConfig, checkpoint.state["config"]["model"]))


def open_model(path: Path, device: torch.device) -> tuple[CausalLM, Tokenizer]:
    """A model in fp32 and its tokenizer, from any of the three kinds of directory."""
    _require_directory(path)
    if (path / "config.json").exists():
        model, tokenizer_directory = load_model(path, load_config(path)), path
    else:
        source = open_native(path)
        model, tokenizer_directory = CausalLM(source.config), source.tokenizer_directory
        source.checkpoint.fill("model/", dict(model.named_parameters()))
    tokenizer = open_tokenizer(tokenizer_directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"checkpoint={path}: the tokenizer in {tokenizer_directory} has {tokenizer.vocab_size} ids, the model only "
            f"{model.config.vocab_size}; they do not belong together."
        )
    return model.to(device), tokenizer


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that stands beside a model."""
    if not any((directory / name).exists() for name in (MODEL_FILE, TOKENIZER_FILE)):
        raise InputError(
            f"checkpoint: there is no {MODEL_FILE} in {directory}, nor a {TOKENIZER_FILE}, so its text can not be read."
        )
    return load_tokenizer(directory)


def write_export(
    config: ModelConfig,
    parameters: Iterable[tuple[str, Tensor]],
    tokenizer_directory: Path,
    output: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Export with the control ids of the tokenizer in `tokenizer_directory`."""
    tokenizer = open_tokenizer(tokenizer_directory)

    def write_tokenizer(directory: Path) -> None:
        tokenizer.save(directory, config.max_position_embeddings)

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    export(config, parameters, write_tokenizer, ids, output, dtype)


def _require_directory(path: Path) -> None:
    if not os.path.isdir(path):
        raise InputError(f"checkpoint={path}: there is no such directory.")
