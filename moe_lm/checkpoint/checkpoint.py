"""One checkpoint on disk: verified before anything of it is used, and read tensor by tensor, or box by box.

A checkpoint is a directory of safetensors files that hold slices of globally named tensors, and of four others:

    index.json      of each tensor its type, global shape, and the file, key, offsets and lengths of each slice
    state.json      whatever else the run is made of
    manifest.json   size and SHA-256 of every file above
    COMPLETE        written last: the SHA-256 of manifest.json

Opening compares every byte with its hash, every file's tensors with the index (each there once, of the type and shape
that the index says) and every tensor's slices with its shape (each value once). It reads no file that the manifest does
not name, follows no link, bounds what it reads into memory, and never runs code: there is no pickle. Nothing is loaded
of a checkpoint that fails any of this.

The package knows tensors and JSON, not models: names, prefixes and their meaning belong to the caller.
"""

import dataclasses
import math
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lm.checkpoint.tensor_file import DTYPES, CheckpointError, TensorKind, are_sizes, parse_object, read_kinds
from moe_lm.files import sha256

MIB = 2**20

GONE = "was deleted while it was read, as a run in training deletes older checkpoints"
LIMITS = {"COMPLETE": 100, "manifest.json": 4 * MIB, "state.json": 16 * MIB, "index.json": 32 * MIB}
"""Largest files of each name that are read, in bytes: JSON takes up to some fifty times its size in memory."""

INDEX_OF_FILE = MIB // 2
"""What index.json may have besides for each file of tensors: many processes cut a model into many slices."""

SLICES = 2**16
"""Most slices of one tensor: experts in no order, cut among thousands of processes, do not take more."""

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

TENSORS_SUFFIX = ".safetensors"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A box of a tensor, and where it is stored."""

    file: str
    key: str
    offsets: list[int]
    lengths: list[int]

    def common(self, offsets: list[int], lengths: list[int]) -> list[tuple[int, int]] | None:
        """Begin and end, in each dimension, of the box shared with another; null where they share no value."""
        sides = zip(self.offsets, self.lengths, offsets, lengths)
        box = [(max(o, p), min(o + n, p + m)) for o, n, p, m in sides]
        return box if all(begin < end for begin, end in box) else None


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of the index: slices that cover it, each value once."""

    kind: TensorKind
    slices: list[_Slice]


class Checkpoint:
    """A verified checkpoint on disk. Tensors are read when asked for."""

    def __init__(self, path: Path, verified: Collection[str] = ()):
        """Verify the directory; raise `CheckpointError` unless every byte is as it was written.

        Args:
            path: The directory.
            verified: Files whose content was compared just now, by whoever wrote them; their size is looked at.
        """
        self.path = path
        try:
            self.files = _verify(path, verified)
            self.state: dict[str, Any] = read_object(path / "state.json")
            files = sum(name.endswith(TENSORS_SUFFIX) for name in self.files)
            tensors = read_object(path / "index.json", files * INDEX_OF_FILE)["tensors"]
            self._tensors = {name: _parse_entry(name, entry, self.files) for name, entry in tensors.items()}
            _compare_with_files(path, self.files, self._tensors)
        except FileNotFoundError as error:
            raise CheckpointError(f"{Path(error.filename).name} is missing") from error
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise CheckpointError(f"unreadable: {error!r}") from error

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(self.files.values())

    def kinds(self, prefix: str = "") -> dict[str, TensorKind]:
        """Type and shape of the tensors whose names begin with `prefix`."""
        return {name: entry.kind for name, entry in self._tensors.items() if name.startswith(prefix)}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, put together from its slices, on the CPU."""
        if name not in self._tensors:
            raise CheckpointError(f"index.json: there is no tensor {name}")
        shape = self._tensors[name].kind.shape
        return self.box(name, [0] * len(shape), shape)

    def box(self, name: str, offsets: list[int], lengths: list[int]) -> Tensor:
        """Read a part of a tensor from the slices that share values with it, and nothing of the others."""
        entry = self._tensors[name]
        try:
            whole = torch.empty(lengths, dtype=entry.kind.dtype)
            for part in entry.slices:
                if (common := part.common(offsets, lengths)) is None:
                    continue
                here = tuple(slice(begin - o, end - o) for (begin, end), o in zip(common, offsets))
                there = tuple(slice(begin - o, end - o) for (begin, end), o in zip(common, part.offsets))
                with safe_open(self.path / part.file, framework="pt") as file:
                    whole[here] = file.get_slice(part.key)[there] if there else file.get_tensor(part.key)
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:
            if not self.path.exists():
                raise CheckpointError(f"{self.path}: {GONE}; give the command again") from error
            raise CheckpointError(f"{name} can not be read: {error}") from error
        return whole

    def expect(self, kinds: Mapping[str, TensorKind], prefix: str = "") -> None:
        """Refuse by name unless the tensors that begin with `prefix` are these, no more and no fewer."""
        here = self.kinds(prefix)
        wrong = [f"{name} is missing" for name in kinds if name not in here]
        wrong += [f"{name} is not expected" for name in here if name not in kinds]
        wrong += [
            f"{name} is {here[name]} instead of {kind}" for name, kind in kinds.items() if here.get(name, kind) != kind
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(f"{self.path}: {'; '.join(wrong[:3])}{more}")


def completion_mark(path: Path) -> bytes:
    """What COMPLETE holds: the hash of manifest.json."""
    return f"{sha256(path / 'manifest.json')}\n".encode()


def _verify(path: Path, verified: Collection[str]) -> dict[str, int]:
    """Compare every file with the manifest, and the manifest with the completion mark; the files' sizes by name."""
    _check_plain(path / "manifest.json")
    if _read_small(path / "COMPLETE") != completion_mark(path):
        raise CheckpointError("manifest.json is not the one that COMPLETE was written for")
    manifest = read_object(path / "manifest.json")
    for name, expected in manifest.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"manifest.json: {name!r} is not a file name of a checkpoint")
        size = _check_plain(path / name, len(manifest) * INDEX_OF_FILE if name == "index.json" else 0)
        if size != expected["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if name not in verified and sha256(path / name) != expected["sha256"]:
            raise CheckpointError(f"{name} does not have the content it was written with (SHA-256 differs)")
    if missing := {"index.json", "state.json"} - manifest.keys():
        raise CheckpointError(f"manifest.json does not name {min(missing)}")
    return {name: expected["bytes"] for name, expected in manifest.items()}


def _check_plain(path: Path, more: int = 0) -> int:
    """Size of a file that must be one: no link that leads elsewhere, nothing that blocks its reader.

    It is within its limit, and so many bytes more.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is not a plain file")
    limit = LIMITS.get(path.name, status.st_size) + more
    if status.st_size > limit:
        raise CheckpointError(f"{path.name} has {status.st_size:,} bytes, more than {limit:,}")
    return status.st_size


def _read_small(path: Path, more: int = 0) -> bytes:
    _check_plain(path, more)
    return path.read_bytes()


def read_object(path: Path, more: int = 0) -> dict[str, Any]:
    """A JSON file of a checkpoint, within its limit and so many bytes more."""
    return parse_object(_read_small(path, more), path.name)


def _parse_entry(name: str, entry: dict[str, Any], files: Mapping[str, int]) -> _Entry:
    """One tensor of index.json; its slices lie in verified files and inside the tensor, and cover it exactly."""
    dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
    if len(entry["slices"]) > SLICES:
        raise CheckpointError(f"index.json: {name} has more than {SLICES} slices")
    slices = [_Slice(**part) for part in entry["slices"]]
    if dtype is None or not are_sizes(shape):
        raise CheckpointError(f"index.json: {name} has no valid type and shape")
    for part in slices:
        if part.file not in files:
            raise CheckpointError(f"index.json: {name} lies in {part.file!r}, which manifest.json does not name")
        fits = (
            are_sizes(part.offsets)
            and are_sizes(part.lengths)
            and len(part.offsets) == len(part.lengths) == len(shape)
            and all(o + n <= size for o, n, size in zip(part.offsets, part.lengths, shape))
        )
        if not fits:
            raise CheckpointError(f"index.json: a slice of {name} reaches beyond its shape {shape}")
    covered, total = sum(math.prod(part.lengths) for part in slices), math.prod(shape)
    if covered != total or _overlap(slices):
        raise CheckpointError(f"index.json: the slices of {name} hold {covered} of {total} values, or some twice")
    return _Entry(TensorKind(dtype, shape), slices)


def _overlap(slices: list[_Slice]) -> bool:
    """Whether two boxes share a value; each is compared with those alone that begin before it ends."""
    ordered = sorted(slices, key=lambda part: part.offsets[:1])
    for number, part in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if part.offsets and other.offsets[0] >= part.offsets[0] + part.lengths[0]:
                break
            if part.common(other.offsets, other.lengths) is not None:
                return True
    return False


def _compare_with_files(path: Path, files: Mapping[str, int], tensors: Mapping[str, _Entry]) -> None:
    """The files hold the slices that the index says, of its types and shapes, and nothing else."""
    stored = {
        (file, key): kind
        for file in files
        if file.endswith(TENSORS_SUFFIX)
        for key, kind in read_kinds(path / file).items()
    }
    for name, entry in tensors.items():
        for part in entry.slices:
            kind, said = stored.pop((part.file, part.key), None), TensorKind(entry.kind.dtype, part.lengths)
            if kind is None:
                raise CheckpointError(f"{part.file}: {part.key!r} of {name} is not there, or belongs to another slice")
            if kind != said:
                raise CheckpointError(f"{part.file}: {name} is {kind}, and {said} by the index")
    if stored:
        file, key = min(stored)
        raise CheckpointError(f"{file}: {key!r} is in no tensor of the index")
