"""Write a model as a Hugging Face directory, complete or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint.tensor_file import write_tensors
from moe_lm.errors import InputError
from moe_lm.files import sync_directory, write_json
from moe_lm.hf.layout import model_type, to_disk, to_hf_config
from moe_lm.model.config import ModelConfig

SHARD_BYTES = 4 * 2**30
"""Largest file of an export, unless one tensor alone is larger."""

MARK = "moe_lm_export.json"
"""Written into every export: names its files, so that a later export may replace them and nothing else."""


def check_output(directory: Path, remedy: str = "give another output=") -> None:
    """Refuse a directory that can not be written, or that holds anything but an earlier export, before any work is done
    for it.

    Args:
        directory: where an export is to go.
        remedy: what the user can change, for the sentence.
    """
    try:
        present = {p.name: p for p in directory.iterdir()} if directory.exists() else {}
        parent = next(p for p in directory.absolute().parents if p.exists())
    except OSError as error:
        raise InputError(f"{directory}: can not be an output directory ({error.strerror}); {remedy}.") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{directory}: {parent} is not a directory that can be written; {remedy}.")
    if not present:
        return
    written = _earlier_export(directory / MARK)
    if not written:
        raise InputError(f"{directory}: holds something that is not an export of moe-lm; {remedy}, or remove it.")
    foreign = sorted(name for name, p in present.items() if name not in written or not p.is_file())
    if foreign:
        raise InputError(
            f"{directory}: holds something that the export did not write ({foreign[0]}); {remedy}, or remove it."
        )


def _earlier_export(mark: Path) -> set[str]:
    """Names of the files that an earlier export wrote; empty where there was none."""
    try:
        return {MARK, *json.loads(mark.read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def export(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    write_tokenizer: Callable[[Path], None],
    token_ids: dict[str, int],
    output: Path,
    dtype: torch.dtype,
) -> None:
    """Write weights, configuration, generation defaults and tokenizer; the directory appears under its name when
    complete, and an earlier export stays there until then.

    Args:
        config: the model.
        tensors: its parameters by native name; a tied output head is absent.
        write_tokenizer: writes the tokenizer's files into the directory that it is given.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
        output: directory to make, or an earlier export to replace.
        dtype: type of the weights on disk.
    """
    check_output(output)
    output = output.resolve()
    temporary, replaced = output.with_name(f".tmp-{output.name}"), output.with_name(f".old-{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{output}: can not be written ({error.strerror}); give another output=.") from error
    try:
        _write_weights(temporary, tensors, dtype)
        _write_configs(temporary, config, token_ids, dtype)
        write_tokenizer(temporary)
        files = sorted(p.name for p in temporary.iterdir())
        write_json(temporary / MARK, {"files": files})
        sync_directory(temporary)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    sync_directory(output.parent)


def _write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Stream tensors into shards; a single shard is named model.safetensors, several get an index."""
    shards: list[list[str]] = []
    total = 0
    batch: dict[str, Tensor] = {}
    size = 0

    def close() -> None:
        nonlocal batch, size
        write_tensors(directory / f"{len(shards):05d}.part", batch)
        shards.append(list(batch))
        batch, size = {}, 0

    for name, tensor in to_disk(tensors):
        # A view of a stacked tensor would drag the whole stack into the file: store a matrix of its own.
        own = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if batch and size + own.nbytes > SHARD_BYTES:
            close()
        batch[name] = own
        size += own.nbytes
        total += own.nbytes
    close()
    if len(shards) == 1:
        (directory / "00000.part").rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (directory / f"{i:05d}.part").rename(directory / name)
    weight_map = {tensor: name for name, tensors_of in zip(names, shards) for tensor in tensors_of}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _write_configs(directory: Path, config: ModelConfig, token_ids: dict[str, int], dtype: torch.dtype) -> None:
    from transformers import AutoConfig, GenerationConfig

    name = model_type(config)
    written = AutoConfig.for_model(name, **to_hf_config(config), **token_ids)
    written.architectures = [f"{name.capitalize()}ForCausalLM"]
    written.dtype = str(dtype).removeprefix("torch.")
    written.save_pretrained(directory)
    GenerationConfig(**token_ids).save_pretrained(directory)
