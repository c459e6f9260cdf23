"""Where commands take a trained model from: a run directory, one of its checkpoints, or a Hugging Face directory."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint.checkpoint import Checkpoint, read_object
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore
from moe_lm.checkpoint.tensor_file import CheckpointError, TensorKind
from moe_lm.config import to_dataclass
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.data.tokenizer_files import MODEL_FILE
from moe_lm.data.tokenizer_huggingface import TOKENIZER_FILE
from moe_lm.errors import InputError
from moe_lm.finetune.base import choose_trained, fingerprint
from moe_lm.finetune.config import FinetuneConfig, Method
from moe_lm.finetune.lora import adapter_names, is_adapter, merged
from moe_lm.hf.files import INDEX, SINGLE
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.hf.model_configuration import load_config
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.model.router import Router
from moe_lm.model.source import ModelSource
from moe_lm.training.state import MODEL


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
    def tokenizer_directory(self) -> Path | None:
        """Directory of the tokenizer's files; null where there are none."""
        return find_tokenizer(self.run_directory / "tokenizer")

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


@dataclasses.dataclass(frozen=True)
class MergedSource(NativeSource):
    """A checkpoint of a LoRA run as a whole model: its base, with the adapters added to the weights."""

    base: ModelSource
    finetune: FinetuneConfig

    @property
    def base_fingerprint(self) -> str:
        """Of the base's weights."""
        return self.checkpoint.state["start"]["base_fingerprint"]

    def tensor(self, name: str) -> Tensor:
        """A whole parameter; in fp32 where there is an adapter of it, else in the base's type."""
        weight = self.base.tensor(name)
        adapters = self.checkpoint.kinds(MODEL)
        if MODEL + adapter_names(name)[0] not in adapters:
            return weight
        return merged(name, weight, super().tensor, self.finetune.scale)


def open_source(path: Path, option: str = "checkpoint", base: Path | None = None) -> ModelSource:
    """The model that `path` names, verified: a run directory (its newest checkpoint), one of its checkpoints, a Hugging
    Face directory, or one of Mistral's own files.

    Args:
        path: Where it is.
        option: How the user gave it, for messages.
        base: Where the base of a LoRA run is; null looks where it was.

    Raises:
        InputError: There is none, or it can not be read whole.
    """
    _require_directory(path, option)
    if is_foreign(path):
        return HuggingFaceSource(path, find_tokenizer(path))
    return open_native(path, option, base)


def describe(path: Path, option: str = "checkpoint") -> tuple[ModelConfig, Path | None]:
    """Configuration and tokenizer's directory of what `open_source` would open, without a look at the weights."""
    _require_directory(path, option)
    if is_foreign(path):
        return load_config(path), find_tokenizer(path)
    single, run_directory = (path / "COMPLETE").exists(), _run_directory(path)
    checkpoints = [path] if single else CheckpointStore(run_directory / "checkpoints", CheckpointConfig()).paths()[::-1]
    for checkpoint in checkpoints:
        try:
            config = read_object(checkpoint / "state.json")["config"]["model"]
        except (CheckpointError, OSError, KeyError, TypeError):
            continue  # so will `open_source`, and say why
        return to_dataclass(ModelConfig, config), find_tokenizer(run_directory / "tokenizer")
    source = open_native(path, option)
    return source.config, source.tokenizer_directory


def is_foreign(path: Path) -> bool:
    """Whether a directory is somebody else's model, rather than a run or a checkpoint."""
    return any((path / name).exists() for name in ("config.json", "params.json", SINGLE, INDEX))


def _run_directory(path: Path) -> Path:
    """The run that a directory is, whose `checkpoints` it is, or of which it is one checkpoint."""
    if (path / "COMPLETE").exists():
        return path.absolute().parent.parent
    is_store = path.absolute().name == "checkpoints" and not (path / "checkpoints").exists()
    return path.absolute().parent if is_store else path


def open_native(path: Path, option: str = "checkpoint", base: Path | None = None) -> NativeSource:
    """Find and verify the checkpoint that `path` names: a checkpoint itself, or a run's newest."""
    _require_directory(path, option)
    run_directory = _run_directory(path)
    if (path / "COMPLETE").exists():
        try:
            checkpoint = Checkpoint(path)
        except CheckpointError as error:
            raise InputError(f"{option}={path}: {error}.") from error
    else:
        store = CheckpointStore(run_directory / "checkpoints", CheckpointConfig())
        newest = store.newest(refused=lambda reason: print(f"refused checkpoint {reason}", file=sys.stderr))
        if newest is None and (path / "adapter_config.json").exists():
            raise InputError(
                f"{option}={path}: holds an adapter of PEFT and no model; merge it into its base with peft "
                "(merge_and_unload), save that, and give its directory."
            )
        if newest is None:
            raise InputError(
                f"{option}={path}: holds no complete checkpoint; give a run directory, a step-… directory, or a "
                "Hugging Face directory."
            )
        checkpoint = newest
    saved = checkpoint.state.get("config")
    if not isinstance(saved, dict):
        raise InputError(f"{option}={path}: was not written by moe-lm; its state.json has no config.")
    config = to_dataclass(ModelConfig, saved.get("model"))
    finetune = to_dataclass(FinetuneConfig, saved.get("finetune", {}))
    source = NativeSource(run_directory, checkpoint, config)
    if finetune.method is Method.lora:
        source = MergedSource(run_directory, checkpoint, config, _open_base(checkpoint, base), finetune)
    _check_parameters(source, finetune)
    return source


def _open_base(checkpoint: Checkpoint, given: Path | None) -> ModelSource:
    """The model that a checkpoint's adapters were trained on, known by its fingerprint: where it was, its export beside
    it, or where the user says.
    """
    start = checkpoint.state.get("start", {})
    recorded = Path(start.get("base", ""))
    places = [recorded, recorded.parent.parent / "hf"] if given is None else [given]
    present = [place for place in places if place.is_dir()]
    for place in present:
        try:
            base = open_source(place, "base")
        except InputError:
            if place == present[-1]:
                raise
            continue  # damaged: perhaps its export is not
        if fingerprint(base) == start.get("base_fingerprint"):
            return base
    if given is not None:
        missing = "is no directory" if given.exists() else "there is no such directory"
        found = "is another model than the adapters' base" if present else missing
        raise InputError(
            f"base={given}: {found}; give the model that {checkpoint.path} was trained on, then in {recorded}, a copy "
            "or an fp32 export of it."
        )
    where = " or ".join(map(str, places))
    found = f"another model than their base is in {where}" if present else f"their base is not in {where} any more"
    raise InputError(
        f"checkpoint={checkpoint.path}: holds adapters alone, and {found}; say where a copy or an fp32 export of it is "
        "by `moe-lm export checkpoint=… base=DIRECTORY`, which makes a whole model of them."
    )


def _check_parameters(source: NativeSource, finetune: FinetuneConfig) -> None:
    """The checkpoint holds the parameters of its configuration, no more and no fewer, in whatever type."""
    kinds = source.checkpoint.kinds(MODEL)
    if source.config.num_hidden_layers > len(kinds):  # before any layer is built
        raise InputError(f"checkpoint={source.path}: has fewer tensors than its configuration has layers.")
    with torch.device("meta"):
        model = CausalLM(source.config)
        if finetune.method is Method.lora:
            choose_trained(model, finetune)
    expected = {}
    for name, parameter in model.named_parameters():
        if finetune.method is Method.lora and not is_adapter(name):
            continue
        stored = kinds.get(MODEL + name)
        expected[MODEL + name] = TensorKind(stored.dtype if stored else torch.float32, list(parameter.shape))
    source.checkpoint.expect(expected, MODEL)


def open_model(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Tokenizer]:
    """A model to generate with and its tokenizer, from any directory that `open_source` takes.

    Raises:
        InputError: There is no model or no tokenizer, or they do not belong together.
    """
    source = open_source(path)
    model = load_model(source, device, dtype)
    tokenizer = open_tokenizer(source)
    check_belongs(tokenizer, source.tokenizer_directory, model.config)
    return model, tokenizer


@torch.no_grad()
def load_model(source: ModelSource, device: torch.device, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model to generate with.

    Routers are in fp32 whatever the rest is, and nothing is dropped: a text must not depend on the others of its batch.
    """
    with torch.device("meta"):
        model = CausalLM(dataclasses.replace(source.config, capacity_factor=None)).to(dtype)
    for module in model.modules():
        if isinstance(module, Router):
            module.float()
    model.to_empty(device=device)
    if source.config.tie_word_embeddings:  # which the line above has untied
        model.lm_head.weight = model.model.embed_tokens.weight
    targets = dict(model.named_parameters())
    for name, tensor in source.parameters():
        targets.pop(name).copy_(tensor)
    assert not targets, f"without a value: {list(targets)}"
    return model


def find_tokenizer(directory: Path) -> Path | None:
    """The directory, if it has a tokenizer's files."""
    return directory if any((directory / name).exists() for name in (MODEL_FILE, TOKENIZER_FILE)) else None


def open_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer that stands beside a model."""
    if source.tokenizer_directory is None:
        place = source.run_directory / "tokenizer" if isinstance(source, NativeSource) else source.path
        raise InputError(
            f"checkpoint: there is no {MODEL_FILE} in {place}, nor a {TOKENIZER_FILE}, so its text can not be read; "
            "put the one that it was trained with there."
        )
    return load_tokenizer(source.tokenizer_directory)


def check_belongs(tokenizer: Tokenizer, directory: Path | None, config: ModelConfig) -> None:
    """Refuse a tokenizer, from this directory, that has more ids than the model has rows."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"checkpoint: the tokenizer in {directory} has {tokenizer.vocab_size} ids, the model only "
            f"{config.vocab_size}; put the model's own there (`import` and `upcycle` also go on without any)."
        )


def check_outside(output: Path, source: ModelSource) -> None:
    """Refuse to write into somebody else's directory, which shall stay as it came; a run has room for what is made of
    it.
    """
    foreign = source.base if isinstance(source, MergedSource) else source
    if isinstance(foreign, HuggingFaceSource) and output.resolve().is_relative_to(foreign.path.resolve()):
        raise InputError(
            f"output={output}: lies in {foreign.path}, which is left as it is; give a place outside of it."
        )


def _require_directory(path: Path, option: str) -> None:
    if not os.path.isdir(path):
        is_file = os.path.exists(path)
        said = "is no directory; give the one that it lies in" if is_file else "there is no such directory"
        if option == "base" and not is_file:
            said += "; a run whose base was moved goes on with base=COPY resume.allow_change=[base]"
        raise InputError(f"{option}={path}: {said}.")
