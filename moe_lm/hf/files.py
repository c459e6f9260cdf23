"""The files of a model directory that somebody else wrote: JSON and safetensors, checked before anything is read.

Nothing else of weights and configuration is opened. There is no pickle, and no Python of the directory's own
(`auto_map`) is ever run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lm.checkpoint.tensor_file import CheckpointError, TensorKind, read_kinds
from moe_lm.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Weights of a Hugging Face directory: one file, or several and their index."""

CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
"""Index of Mistral's own layout, where there is one."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that are read."""

_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_CONSOLIDATED = re.compile(r"consolidated(\.\d+|-\d+-of-\d+)?\.safetensors")
_PICKLED = re.compile(r".*\.(bin|pth|pt|pkl|ckpt)")


class StoredTensor(NamedTuple):
    """Where a tensor is stored, and what it is."""

    path: Path
    kind: TensorKind


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: It is missing or something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: can not be read as JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object; fetch it again.")
    return value


def _unreadable(path: Path, error: OSError) -> InputError:
    remedy = "let yourself read it" if isinstance(error, PermissionError) else "fetch it again"
    return InputError(f"{path}: can not be read ({error.strerror}); {remedy}.")


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face directory, by its name on disk.

    Raises:
        InputError: There are no safetensors files, one is damaged, or the index does not say what they hold.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise InputError(f"{directory}: holds both {SINGLE} and {INDEX}; remove the one that does not belong to it.")
    if index.exists():
        return _indexed(index)
    shards = sorted(path.name for path in directory.iterdir() if _SHARD.fullmatch(path.name))
    if shards and not single.exists():
        raise InputError(f"{index}: is missing, which says what {shards[0]} and the others hold; fetch it again.")
    _refuse_pickle(directory, SINGLE)
    return _joined([single])


def has_consolidated(directory: Path) -> bool:
    """Whether a directory is in Mistral's own layout alone; where both are there, Hugging Face's is read."""
    named = any((directory / name).exists() for name in ("config.json", SINGLE, INDEX))
    return not named and (directory / "params.json").exists()


def find_consolidated(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory in Mistral's own layout, by its name on disk; raises as `find_tensors` does."""
    index = directory / CONSOLIDATED_INDEX
    if index.exists():
        return _indexed(index)
    paths = sorted(path for path in directory.iterdir() if _CONSOLIDATED.fullmatch(path.name))
    if not paths:
        _refuse_pickle(directory, "consolidated.safetensors")
    return _joined(paths or [directory / "consolidated.safetensors"])


def _refuse_pickle(directory: Path, wanted: str) -> None:
    """Say what can be done where there are weights, but none that are read."""
    if (directory / wanted).exists():
        return
    pickled = sorted(path.name for path in directory.iterdir() if _PICKLED.fullmatch(path.name))
    if pickled:
        raise InputError(
            f"{directory}: holds its weights as pickles alone ({pickled[0]}), which can run code when they are read; "
            "where you trust them, convert them with transformers (AutoModelForCausalLM.from_pretrained(…)"
            ".save_pretrained(…); for Mistral's own files, its convert_mistral_weights_to_hf.py) to safetensors."
        )


def _indexed(index: Path) -> dict[str, StoredTensor]:
    """Tensors of the files that an index names; it says of each file what it holds, no more and no less."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: weight_map is missing; fetch it again.")
    for file in weight_map.values():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise InputError(
                f"{index}: {file!r} is not the name of a safetensors file in this directory; fetch it again."
            )
    found = _joined([index.parent / file for file in sorted(set(weight_map.values()))])
    for name, file in weight_map.items():
        if name not in found:
            raise InputError(f"{index.parent / file}: {name} is missing, and {index.name} says that it is there.")
        if found[name].path.name != file:
            raise InputError(f"{index}: {name} is in {found[name].path.name}, and not in {file}.")
    if unnamed := sorted(found.keys() - weight_map.keys()):
        path = found[unnamed[0]].path
        raise InputError(
            f"{index}: has no entry for {unnamed[0]}, which {path.name} holds; bring the whole index back."
        )
    return found


def _joined(paths: list[Path]) -> dict[str, StoredTensor]:
    """Tensors of several files, none of which is in two."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            kinds = read_kinds(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path.name}: ")
            raise InputError(f"{path}: can not be read ({reason}); fetch it again.") from error
        for name, kind in kinds.items():
            if name in found:
                raise InputError(f"{path}: {name} is in {found[name].path.name} as well; remove one of the files.")
            found[name] = StoredTensor(path, kind)
    return found


@torch.no_grad()
def read_into(slots: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Copy tensors from disk into views of as many values, by name; files are mapped only while they are read.

    Raises:
        InputError: One can not be read.
    """
    for path in sorted({stored[name].path for name in slots}):
        here = [name for name in slots if stored[name].path == path]
        try:
            with safe_open(path, framework="pt") as reader:
                for name in here:
                    slots[name].copy_(reader.get_tensor(name).view(slots[name].shape))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: can not be read any more, from {here[0]} on ({error}).") from error
