"""Write a model as a Hugging Face directory: complete and verified, or not at all."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint.tensor_file import write_tensors
from moe_lm.errors import InputError, RunError
from moe_lm.files import new_directory, write_atomically, write_json
from moe_lm.hf.configuration_parity import generation_ids, token_ids
from moe_lm.hf.files import read_object
from moe_lm.hf.layout import model_type, to_disk, to_hf_config
from moe_lm.hf.receipt import MARK, RECEIPT, Receipt, VerificationError, files_of_export
from moe_lm.hf.tokenizer_parity import TextTokenizer
from moe_lm.hf.verification import verify_export
from moe_lm.model.config import ModelConfig
from moe_lm.model.source import ModelSource

SHARD_BYTES = 4 * 10**9
"""Largest file of weights, unless one tensor alone is larger."""

CARD = "README.md"
"""The model card's file."""


def check_output(directory: Path, remedy: str = "give another output=") -> None:
    """Refuse a directory that can not be written, or that holds anything but an earlier export, before any work is done
    for it.

    Args:
        directory: where an export is to go.
        remedy: what the user can change, for the sentence.
    """
    try:
        present = {p.name: p for p in directory.iterdir()} if directory.exists() else {}
        parent = next((p for p in directory.absolute().parents if p.exists()), directory)
    except OSError as error:
        raise InputError(f"{directory}: can not be an output directory ({error.strerror}); {remedy}.") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{directory}: {parent} is not a directory that can be written; {remedy}.")
    if not present:
        return
    written = files_of_export(directory)
    if not written:
        raise InputError(f"{directory}: holds something that is not an export of moe-lm; {remedy}, or remove it.")
    foreign = sorted(name for name, p in present.items() if name not in written or not p.is_file())
    if foreign:
        raise InputError(
            f"{directory}: holds something that the export did not write ({foreign[0]}); {remedy}, or remove it."
        )


def check_expressible(config: ModelConfig, remedy: str) -> None:
    """Refuse a model that computes what Mixtral's format has no words for: another program would compute something
    else from the same weights, and nobody would be told.

    Args:
        config: the model.
        remedy: what the user can do, for the sentence.
    """
    if config.capacity_factor is not None:
        raise InputError(
            f"model.capacity_factor={config.capacity_factor}: drops tokens in the forward pass, which Mixtral's format "
            f"can not express; {remedy}."
        )


def export(
    source: ModelSource,
    tokenizer: TextTokenizer,
    output: Path,
    dtype: torch.dtype,
    card: Callable[[Receipt], str],
    max_shard_bytes: int = SHARD_BYTES,
    whole: bool | None = None,
) -> Receipt:
    """Write weights, configuration, generation defaults and tokenizer; read them back and compare them with the source;
    only then the directory appears under its name. An earlier export stays there until then.

    Args:
        source: the model.
        tokenizer: what it was trained with.
        output: directory to make, or an earlier export to replace.
        dtype: type of the weights on disk.
        card: makes the text of README.md from the receipt.
        max_shard_bytes: largest file of weights, unless one tensor alone is larger.
        whole: whether the whole model is run for the comparison; null means where it fits into memory.

    Raises:
        InputError: the directory can not be written, or the model can not be expressed.
        RunError: what was written is not the model; nothing is left of it.
    """
    check_expressible(source.config, "go on training with model.capacity_factor=null by `finetune`, and export that")
    with new_export(output) as directory:
        _write_weights(directory, source.parameters(), dtype, max_shard_bytes)
        _write_configs(directory, source.config, tokenizer, dtype)
        tokenizer.save(directory, source.config.max_position_embeddings)
        try:
            receipt = verify_export(directory, source, tokenizer, dtype, whole)
        except VerificationError as error:
            raise RunError(f"{error}; nothing was written to {output}") from error
        write_json(directory / RECEIPT, receipt.to_json())
        write_atomically(directory / CARD, card(receipt).encode())
    return receipt


@contextmanager
def new_export(output: Path) -> Iterator[Path]:
    """An empty directory that takes the output's name, and an earlier export's place, when the block has filled it; it
    is gone if the block fails.

    Raises:
        InputError: What is there must not be replaced, can not be written, or is being written by another process.
    """
    with new_directory(output, lambda: check_output(output)) as directory:
        yield directory
        write_json(directory / MARK, {"files": sorted(p.name for p in directory.iterdir())})


def _write_weights(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> None:
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
        if batch and size + own.nbytes > max_shard_bytes:
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


def _write_configs(directory: Path, config: ModelConfig, tokenizer: TextTokenizer, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, GenerationConfig

    name = model_type(config)
    written = AutoConfig.for_model(name, **to_hf_config(config), **token_ids(tokenizer))
    written.architectures = [f"{name.capitalize()}ForCausalLM"]
    written.dtype = str(dtype).removeprefix("torch.")
    written.save_pretrained(directory)
    # transformers before 5 knows no `rope_parameters`, and takes 1e6 where the base is not a field of its own.
    path = directory / "config.json"
    write_json(path, read_object(path) | {"rope_theta": config.rope_theta})
    GenerationConfig(**generation_ids(tokenizer)).save_pretrained(directory)
