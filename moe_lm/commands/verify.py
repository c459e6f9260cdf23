"""`moe-lm verify`: is a checkpoint, byte for byte, what was written, is it whole, and is it the same model to
transformers? Is an export still the model that it was made from?
"""

import os
import re
import time
from pathlib import Path

import torch

from moe_lm.checkpoint.checkpoint import GONE, Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.commands.config import VerifyConfig
from moe_lm.commands.model_source import is_foreign, open_native, open_source, open_tokenizer
from moe_lm.config import to_dataclass
from moe_lm.errors import InputError, RunError
from moe_lm.files import write_json
from moe_lm.finetune.base import choose_trained
from moe_lm.finetune.config import FinetuneConfig, Method
from moe_lm.finetune.lora import is_adapter
from moe_lm.hf.export import check_expressible
from moe_lm.hf.files import has_consolidated
from moe_lm.hf.load import HuggingFaceSource
from moe_lm.hf.receipt import Receipt, VerificationError
from moe_lm.hf.verification import verify_alone, verify_export, verify_native
from moe_lm.model.config import ModelConfig
from moe_lm.model.decoder import CausalLM
from moe_lm.training.config import OptimizerConfig
from moe_lm.training.state import check_state


def run(config: VerifyConfig) -> int:
    """Check a directory in Hugging Face's format, one checkpoint, or all of a run; say of each what was found."""
    assert config.checkpoint is not None
    path = Path(config.checkpoint).expanduser()
    if not path.is_dir():
        raise InputError(f"checkpoint={path}: {'is no directory' if path.exists() else 'there is no such directory'}.")
    output = None if config.output is None else _checked_output(Path(config.output).expanduser(), path)
    try:
        receipt = _of_directory(path, config) if is_foreign(path) else _of_checkpoints(path, config)
    except VerificationError as error:
        raise RunError(f"checkpoint={path}: {error}") from error
    if receipt is not None:
        print(f"{receipt.table()}\n\n{receipt.line()}\n{receipt.why}")
        if output is not None:
            write_json(output, receipt.to_json())
    return 0


def _checked_output(output: Path, path: Path) -> Path:
    """The file that the receipt is to be written to, once it can be."""
    if output.is_dir():
        raise InputError(f"output={output}: is a directory; give the name of a file.")
    if output.exists() and not _is_receipt(output):
        raise InputError(f"output={output}: is another file than a receipt, and would be lost; give another one.")
    if output.resolve().is_relative_to(path.resolve()):
        raise InputError(f"output={output}: lies in checkpoint={path}, which is left as it is; give another place.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"output={output}: there is no directory {output.parent}; make it, or give another one.")
    if not os.access(output.absolute().parent, os.W_OK):
        raise InputError(f"output={output}: {output.parent} can not be written in; give another place.")
    return output


def _is_receipt(path: Path) -> bool:
    """Whether a file begins as `Receipt.to_json` does; of a large one, no more is read."""
    if not path.is_file():
        return False  # a device or a pipe
    try:
        with open(path, "rb") as file:
            return re.match(rb'\{\s*"format": \d+,\s*"tier": "', file.read(200)) is not None
    except OSError:
        return False


def _of_directory(path: Path, config: VerifyConfig) -> Receipt:
    """An export, or another directory in Hugging Face's format."""
    if has_consolidated(path):
        raise InputError(
            f"checkpoint={path}: is in Mistral's own layout, which transformers does not read; `import` it, and verify "
            "what that writes."
        )
    directory = open_source(path)
    assert isinstance(directory, HuggingFaceSource)
    print(f"{path}:")
    if config.against is None:
        tokenizer = None if directory.tokenizer_directory is None else open_tokenizer(directory)
        return verify_alone(path, directory, tokenizer, config.whole_model)
    source = open_source(Path(config.against).expanduser(), "against")
    types = {kind.dtype for kind in directory.kinds().values()}
    if len(types) > 1:
        raise VerificationError("tensors", f"an export has one type, and these have {len(types)}")
    return verify_export(path, source, open_tokenizer(source), types.pop(), config.whole_model)


def _of_checkpoints(path: Path, config: VerifyConfig) -> Receipt | None:
    """One checkpoint, or all of a run; the newest is run against transformers, where its format can express it.

    Raises:
        InputError: It can not, and what only that gives was asked for.
    """
    if config.against is not None:
        raise InputError(
            f"against={config.against}: is for an export, and {path} is a native checkpoint; leave it out."
        )
    paths = [one for one in _checkpoints(path) if _is_there(one)]
    if not paths:
        raise RunError(f"checkpoint={path}: {GONE}; give the command again")
    damaged = [one for one in paths if not _is_good(one) and _is_there(one)]
    if damaged:
        raise RunError(f"checkpoint={path}: {len(damaged)} can not be trusted ({damaged[-1].name})")
    source = open_native(paths[-1])
    try:
        check_expressible(source.config, "it is not run against transformers")
    except InputError as error:
        if config.output is not None or config.whole_model:
            asked = "whole_model=true" if config.output is None else f"output={config.output}"
            raise InputError(
                f"{asked}: there is no receipt of this model ({str(error).rstrip('.')}); leave it out."
            ) from error
        print(f"note: {error}")
        return None
    print(f"\n{paths[-1]}, against transformers:")
    return verify_native(source, config.whole_model)


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint that a path is, or those of the run."""
    stores = (CheckpointStore(directory, CheckpointConfig()) for directory in (path / "checkpoints", path))
    paths = next((found for store in stores if (found := store.paths())), [])
    if not paths and not any((path / name).exists() for name in ("COMPLETE", "manifest.json", "index.json")):
        raise InputError(
            f"checkpoint={path}: holds no checkpoint; give a run directory, a step-… directory, or a Hugging Face "
            "directory."
        )
    return paths or [path]


def _is_there(path: Path) -> bool:
    if not path.exists():
        print(f"{path}: {GONE}")
    return path.exists()


def _is_good(path: Path) -> bool:
    start = time.perf_counter()
    try:
        checkpoint = Checkpoint(path)
        rate = checkpoint.num_bytes / (time.perf_counter() - start)
        _check_whole(checkpoint)
    except (CheckpointError, InputError) as error:
        print(f"{path}: REFUSED: {str(error).removeprefix(f'{path}: ')}")
        return False
    print(
        f"{path}: good; {len(checkpoint.kinds())} tensors, {checkpoint.num_bytes / 1e6:,.1f} MB in "
        f"{len(checkpoint.files)} files, every byte as it was written ({rate / 1e6:,.0f} MB/s), all tensors that its "
        "configuration asks for"
    )
    return True


def _check_whole(checkpoint: Checkpoint) -> None:
    """The checkpoint has all tensors of its run, whose configuration is in it; or, of a model that was imported or
    upcycled, all parameters.
    """
    written_by = checkpoint.state.get("config")
    if not isinstance(written_by, dict):
        raise CheckpointError("state.json: has no configuration of a run")
    if "origin" in checkpoint.state:
        open_native(checkpoint.path)
        return
    config, optimizer, finetune = (
        to_dataclass(schema, written_by.get(section, default))
        for schema, section, default in (
            (ModelConfig, "model", None),
            (OptimizerConfig, "optimizer", None),
            (FinetuneConfig, "finetune", {}),
        )
    )
    if config.num_hidden_layers > len(checkpoint.kinds()):  # before any layer is built
        raise CheckpointError(f"{checkpoint.path}: has fewer tensors than its configuration has layers")
    with torch.device("meta"):
        model = CausalLM(config)
        if "finetune" in written_by:
            choose_trained(model, finetune)
    lora = finetune.method is Method.lora
    check_state(checkpoint, model, optimizer, is_saved=lambda name: is_adapter(name) or not lora)
