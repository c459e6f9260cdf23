"""safetensors files: written durably with their hash, and headers that are checked before anything is read.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name → type, shape, first and last byte)
and the tensors' bytes. The library reads the tensors. Headers are read here, because it reads any header of up to
100 MB and takes the last of two tensors with one name; files are written here, because it neither gives a hash of what
it meant to write, nor makes it durable, nor obeys the user's umask.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lm.errors import RunError
from moe_lm.files import write_durably

HEADER_BYTES = 16 * 2**20
"""Longest header that is read: some 100,000 tensors."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}

DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in _NAMES}
"""Types that a checkpoint can hold, by the names that its index gives them."""


class CheckpointError(RunError):
    """A checkpoint that can not be trusted; the message says which file and why."""


class TensorKind(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: list[int]

    @staticmethod
    def of(tensor: Tensor) -> "TensorKind":
        """The kind of a tensor."""
        return TensorKind(tensor.dtype, list(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a durable safetensors file; return its SHA-256.

    Raises:
        OSError: The file exists, or can not be written.
    """
    # The widest types first, as the library does, so that each tensor begins at a multiple of its items' size.
    named = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= HEADER_BYTES, f"{path.name}: too many tensors for one file"
    return write_durably(path, _pieces(text, [tensor for _, tensor in named]))


def _pieces(header: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        if tensor.numel():
            yield memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def read_kinds(path: Path) -> dict[str, TensorKind]:
    """The tensors that a safetensors file holds, each byte of it accounted for.

    Raises:
        CheckpointError: The header is too long, no valid JSON, names a tensor twice, or does not fit the file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path.name}: a header of {length:,} bytes does not fit a file of {size:,}")
        header = parse_object(file.read(length), path.name)
    kinds: dict[str, TensorKind] = {}
    places: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not (isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())):
                raise CheckpointError(f"{path.name}: the header's __metadata__ is not one of texts")
            continue
        try:
            kind, (begin, end) = TensorKind(_TYPES[entry["dtype"]], entry["shape"]), entry["data_offsets"]
            fits = are_sizes(kind.shape) and are_sizes([begin, end]) and end - begin == kind.num_bytes
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(f"{path.name}: the header says no valid type, shape and place of {name!r}")
        kinds[name] = kind
        places.append((begin, end))
    ends = [0, *(end for _, end in sorted(places))]
    if [begin for begin, _ in sorted(places)] != ends[:-1] or ends[-1] != size - 8 - length:
        raise CheckpointError(f"{path.name}: its tensors do not fill the file, each byte once")
    return kinds


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice.

    Raises:
        CheckpointError: It is something else.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands there twice")
    return value


def are_sizes(values: Any) -> bool:
    """Whether this is a list of whole numbers that are not negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
