"""Write a model that no run trained as a native directory: it looks like a run's, and is complete or not there.

checkpoints/step-00000000/   the model alone, in the types it came in
tokenizer/                   the tokenizer's files, as they were, if there were any
import.json or upcycle.json  the receipt: what became of each tensor
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore, TensorSlice
from moe_lm.checkpoint.tensor_file import DTYPES
from moe_lm.commands.model_source import check_belongs
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.data.tokenizer_files import MODEL_FILE
from moe_lm.data.tokenizer_huggingface import COMPANIONS, TEMPLATE_FILE, TOKENIZER_FILE
from moe_lm.errors import InputError
from moe_lm.files import new_directory, write_atomically
from moe_lm.model.accounting import count_parameters
from moe_lm.model.config import ModelConfig
from moe_lm.plain import to_plain
from moe_lm.training.state import MODEL

FILE_BYTES = 2**29
"""Size of the files written, and so about what memory holds besides the parameter that is read."""

SECONDS_BETWEEN_LINES = 30.0

TOKENIZER_FILES = (MODEL_FILE, TOKENIZER_FILE, TEMPLATE_FILE, *COMPANIONS)


def new_model_directory(output: Path) -> AbstractContextManager[Path]:
    """A temporary directory, which is renamed to `output` when the block ends without an exception.

    Raises:
        InputError: `output` is a file, holds something, can not be written, or is being written by another process.
    """

    def check() -> None:
        if output.exists() and not output.is_dir():
            raise InputError(f"output={output}: is a file; give the name of a new directory.")
        if output.exists() and any(output.iterdir()):
            raise InputError(f"output={output}: is not empty; give another one, or remove it.")

    return new_directory(output, check)


def save_parameters(
    directory: Path, config: ModelConfig, parameters: Iterable[tuple[str, Tensor]], origin: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write the checkpoint of step 0, verified, with one parameter in memory at a time besides those of one file.

    Args:
        directory: Of the model.
        config: The model's.
        parameters: By native name, each in the type it is kept in.
        origin: JSON that says where they are from.

    Returns:
        Type, shape and SHA-256 of each parameter.
    """
    written: dict[str, dict[str, Any]] = {}
    state = {"config": {"model": to_plain(config)}, "origin": origin}
    store = CheckpointStore(directory / "checkpoints", CheckpointConfig())
    total = count_parameters(config).total
    store.save(0, _recorded(_reported(parameters, total), written), state, FILE_BYTES)
    return written


def _reported(parameters: Iterable[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
    """The parameters as they come; where they take long, a line now and then says how far it is."""
    done, last = 0, time.monotonic()
    for name, tensor in parameters:
        done += tensor.numel()
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"made {done / 1e9:,.1f} of {total / 1e9:,.1f} billion parameters", flush=True)
        yield name, tensor
        del tensor  # before the next is made


def _recorded(parameters: Iterable[tuple[str, Tensor]], written: dict[str, dict[str, Any]]) -> Iterator[TensorSlice]:
    """Slices of whole parameters; says of each what it was."""
    for name, tensor in parameters:
        if not all(torch.isfinite(edge) for edge in tensor.aminmax()):
            raise InputError(f"checkpoint: {name} holds values that are not finite (NaN or Inf); take a good copy.")
        values = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        digest = hashlib.sha256(values).hexdigest()
        written[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "sha256": digest}
        yield TensorSlice.whole(MODEL + name, tensor)
        del tensor, values  # before the next is read


def copy_tokenizer(source: Path | None, directory: Path, config: ModelConfig) -> None:
    """Copy a tokenizer's files as they are, once it is one that works, and belongs to the model; null copies none.

    Raises:
        InputError: It can not be used, or has more ids than the model.
    """
    if source is None:
        return
    check_belongs(load_tokenizer(source), source, config)
    (directory / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if os.path.isfile(source / name):
            write_atomically(directory / "tokenizer" / name, (source / name).read_bytes())


def said_tokenizer(source: Path | None) -> str:
    """What became of the tokenizer, for the user."""
    return "none; text can not be generated or trained on without one" if source is None else f"copied from {source}"
