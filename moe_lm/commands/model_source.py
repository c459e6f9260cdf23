"""Where commands take a trained model from: a run directory, one of its checkpoints, or a Hugging Face directory."""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore
from moe_lm.checkpoint.tensor_file import CheckpointError, TensorKind
from moe_lm.config import to_dataclass
from moe_lm.data.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer
from moe_lm.data.tokenizer_huggingface import TOKENIZER_FILE
from moe_lm.errors import InputError
from moe_lm.hf.export import export
from moe_lm.hf.files import INDEX, SINGLE
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.source import ModelSource

MODEL = "model/"
"""What the names of a model's parameters begin with in a checkpoint."""


@dataclasses.dataclass(frozen=True)
class NativeSource:
    """A checkpoint of a run, with the run's tokenizer."""

    run_directory: Path
    checkpoint: Checkpoint
    config: ModelConfig

    @property
    def path(self) -> Path:
        """Directory of the checkpoint."""
        return self.checkpoint.path

    @property
    def tokenizer_directory(self) -> Path:
        """Directory of the tokenizer's files."""
        return self.run_directory / "tokenizer"

    def names(self) -> list[str]:
        """Names of all parameters, in the model's own order."""
        with torch.device("meta"):
            model = CausalLM(self.config)
        return [name for name, _ in model.named_parameters()]

    def tensor(self, name: str) -> Tensor:
        """A whole parameter, put together from its slices."""
        return self.checkpoint.tensor(MODEL + name)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by name, read one at a time."""
        return ((name, self.tensor(name)) for name in self.names())


def open_source(path: Path) -> ModelSource:
    """The model that `path` names, verified: a run directory (its newest checkpoint), one of its checkpoints, a Hugging
    Face directory, or one of Mistral's own files.

    Raises:
        InputError: There is none, or it can not be read whole.
    """
    _require_directory(path)
    if any((path / name).exists() for name in ("config.json", "params.json", SINGLE, INDEX)):
        return HuggingFaceSource(path)
    return open_native(path)


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
                f"checkpoint={path}: holds no complete checkpoint; give a run directory, a step-… directory, or a "
                "Hugging Face directory."
            )
        checkpoint, run_directory = newest, path
    if "config" not in checkpoint.state:
        raise InputError(f"checkpoint={path}: was not written by moe-lm; its state.json has no config.")
    source = NativeSource(run_directory, checkpoint, to_dataclass(ModelConfig, checkpoint.state["config"]["model"]))
    _check_parameters(source)
    return source


def _check_parameters(source: NativeSource) -> None:
    """The checkpoint holds the parameters of its configuration, no more and no fewer, in whatever type."""
    kinds = source.checkpoint.kinds(MODEL)
    if source.config.num_hidden_layers > len(kinds):  # before any layer is built
        raise InputError(f"checkpoint={source.path}: has fewer tensors than its configuration has layers.")
    with torch.device("meta"):
        model = CausalLM(source.config)
    expected = {}
    for name, parameter in model.named_parameters():
        stored = kinds.get(MODEL + name)
        expected[MODEL + name] = TensorKind(stored.dtype if stored else torch.float32, list(parameter.shape))
    source.checkpoint.expect(expected, MODEL)


@torch.no_grad()
def open_model(path: Path, device: torch.device) -> tuple[CausalLM, Tokenizer]:
    """A model in fp32 and its tokenizer, from any directory that `open_source` takes."""
    source = open_source(path)
    model = CausalLM(source.config)
    targets = dict(model.named_parameters())
    for name, tensor in source.parameters():
        targets[name].copy_(tensor)
    tokenizer = open_tokenizer(source.tokenizer_directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"checkpoint={path}: the tokenizer in {source.tokenizer_directory} has {tokenizer.vocab_size} ids, the "
            f"model only {model.config.vocab_size}; they do not belong together."
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
