"""The checkpoint store: a directory of checkpoints, each complete or invisible.

A checkpoint is a directory `step-00000100/` of safetensors files that hold slices of globally named tensors,
`index.json` (name → type, global shape, and the file, key, offsets and lengths of each slice), `state.json` (whatever
else the run is made of), `manifest.json` (size and SHA-256 of every file) and, written last, `COMPLETE`, which holds
the manifest's own hash. It is built in a temporary sibling and renamed, so that a kill at any moment leaves the
checkpoints before it as they were. Loading verifies every hash, reads no file that the manifest does not name, and
never runs code: there is no pickle, in writing or in reading.

The store knows tensors and JSON, not models: names, prefixes and their meaning belong to the caller.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lm.errors import RunError
from moe_lm.files import sha256, sync_directory, write_atomically, write_json

FILE_BYTES = 2 * 2**30
"""Tensors are spread over files of about this size."""

_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPORARY = ".tmp-"


class CheckpointError(RunError):
    """A checkpoint that can not be trusted; the message says which file and why."""


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A box of a tensor, and where it is stored."""

    file: str
    key: str
    offsets: list[int]
    lengths: list[int]

    def overlaps(self, other: "_Slice") -> bool:
        """Whether the two boxes share a value."""
        sides = zip(self.offsets, self.lengths, other.offsets, other.lengths)
        return all(max(o, p) < min(o + n, p + m) for o, n, p, m in sides)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of the index: slices that cover it, each value once."""

    dtype: torch.dtype
    shape: list[int]
    slices: list[_Slice]


class Checkpoint:
    """A verified checkpoint on disk. Tensors are read when asked for."""

    def __init__(self, path: Path):
        """Verify the directory; raise `CheckpointError` unless every byte is as it was written."""
        self.path = path
        try:
            files = _verify(path)
            self.state: dict[str, Any] = _read_object(path / "state.json")
            tensors = _read_object(path / "index.json")["tensors"]
            self._tensors = {name: _parse_entry(name, entry, files) for name, entry in tensors.items()}
        except FileNotFoundError as error:
            raise CheckpointError(f"{Path(error.filename).name} is missing") from error
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise CheckpointError(f"unreadable: {error!r}") from error

    @property
    def step(self) -> int:
        """Optimizer steps that the checkpoint's directory is named by."""
        return _step_of(self.path)

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that begin with `prefix`."""
        return [name for name in self._tensors if name.startswith(prefix)]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, put together from its slices, on the CPU."""
        if name not in self._tensors:
            raise CheckpointError(f"index.json: there is no tensor {name}")
        entry = self._tensors[name]
        try:
            whole = torch.empty(entry.shape, dtype=entry.dtype)
            for part in entry.slices:
                region = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.lengths))
                whole[region] = self._piece(name, entry, part)
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{name} can not be read: {error}") from error
        return whole

    @torch.no_grad()
    def fill(self, prefix: str, targets: Mapping[str, Tensor]) -> None:
        """Copy the tensors named `prefix` + name into `targets`, in place; names and shapes must be the same."""
        here, wanted = {name.removeprefix(prefix) for name in self.names(prefix)}, set(targets)
        if here != wanted:
            raise CheckpointError(f"{self.path}: {min(here ^ wanted)} is only in the checkpoint, or only in the model")
        for name, target in targets.items():
            source = self.tensor(prefix + name)
            if source.shape != target.shape:
                shapes = f"{list(source.shape)}, the model's {list(target.shape)}"
                raise CheckpointError(f"{self.path}: {name} has shape {shapes}")
            target.copy_(source)

    def _piece(self, name: str, entry: _Entry, part: _Slice) -> Tensor:
        with safe_open(self.path / part.file, framework="pt") as file:
            piece = file.get_tensor(part.key)
        if piece.dtype != entry.dtype or list(piece.shape) != part.lengths:
            raise CheckpointError(f"{part.file}: {name} is {piece.dtype} {list(piece.shape)}, the index says otherwise")
        return piece


class CheckpointStore:
    """All checkpoints of one run."""

    def __init__(self, directory: Path, keep_last: int):
        self.directory = directory
        self.keep_last = keep_last

    def paths(self) -> list[Path]:
        """Checkpoints that were renamed into place, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=_step_of)

    def save(self, step: int, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> Path:
        """Write a checkpoint, make it durable, then delete the ones that `keep_last` no longer keeps."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.sweep()
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        temporary.mkdir()
        write_json(temporary / "index.json", {"tensors": _write_tensors(temporary, tensors)})
        write_json(temporary / "state.json", state)
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", manifest)
        write_atomically(temporary / "COMPLETE", _completion_mark(temporary))
        sync_directory(temporary)
        if final.exists():
            # Only a checkpoint that failed verification can stand here: the run went on from an older one.
            shutil.rmtree(final)
        temporary.rename(final)
        sync_directory(self.directory)
        # Later steps can only be ones that failed verification: they must not push out what was just written.
        for old in [p for p in self.paths() if _step_of(p) <= step][: -self.keep_last]:
            shutil.rmtree(old)
        return final

    def sweep(self) -> None:
        """Remove what a killed save left behind."""
        for leftover in self.directory.glob(f"{_TEMPORARY}step-*"):
            shutil.rmtree(leftover)

    def newest(self, refused: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; `refused` is told of each newer one that does not, and why."""
        for path in reversed(self.paths()):
            try:
                return Checkpoint(path)
            except CheckpointError as error:
                refused(f"{path}: {error}")
        return None


def _write_tensors(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    index: dict[str, Any] = {}
    for number, batch in enumerate(_batches(tensors)):
        name = f"tensors-{number:05d}.safetensors"
        write_safetensors(batch, directory / name)
        for key, tensor in batch.items():
            assert key not in index, key
            shape = list(tensor.shape)
            part = {"file": name, "key": key, "offsets": [0] * len(shape), "lengths": shape}
            index[key] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape, "slices": [part]}
    return index


def _batches(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        assert name not in batch, name
        batch[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        if size >= FILE_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _completion_mark(path: Path) -> bytes:
    return f"{sha256(path / 'manifest.json')}\n".encode()


def _verify(path: Path) -> set[str]:
    """Compare every file with the manifest, and the manifest with the completion mark; the names of the files."""
    if (path / "COMPLETE").read_bytes() != _completion_mark(path):
        raise CheckpointError("manifest.json is not the one that COMPLETE was written for")
    manifest = _read_object(path / "manifest.json")
    for name, expected in manifest.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"manifest.json: {name!r} is not a file name of a checkpoint")
        status = (path / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name} is not a plain file")
        if status.st_size != expected["bytes"]:
            raise CheckpointError(f"{name} has {status.st_size} bytes instead of {expected['bytes']}")
        if sha256(path / name) != expected["sha256"]:
            raise CheckpointError(f"{name} does not have the content it was written with (SHA-256 differs)")
    if missing := {"index.json", "state.json"} - manifest.keys():
        raise CheckpointError(f"manifest.json does not name {min(missing)}")
    return set(manifest)


def _parse_entry(name: str, entry: dict[str, Any], files: set[str]) -> _Entry:
    """One tensor of index.json; its slices lie in verified files and inside the tensor, and cover it exactly."""
    dtype, shape = getattr(torch, entry["dtype"], None), entry["shape"]
    slices = [_Slice(**part) for part in entry["slices"]]
    if not isinstance(dtype, torch.dtype) or not _are_sizes(shape):
        raise CheckpointError(f"index.json: {name} has no valid type and shape")
    for part in slices:
        if part.file not in files:
            raise CheckpointError(f"index.json: {name} lies in {part.file!r}, which manifest.json does not name")
        fits = (
            _are_sizes(part.offsets)
            and _are_sizes(part.lengths)
            and len(part.offsets) == len(part.lengths) == len(shape)
            and all(o + n <= size for o, n, size in zip(part.offsets, part.lengths, shape))
        )
        if not fits:
            raise CheckpointError(f"index.json: a slice of {name} reaches beyond its shape {shape}")
    covered, total = sum(math.prod(part.lengths) for part in slices), math.prod(shape)
    if covered != total or any(a.overlaps(b) for a, b in itertools.combinations(slices, 2)):
        raise CheckpointError(f"index.json: the slices of {name} hold {covered} of {total} values, or some twice")
    return _Entry(dtype, shape, slices)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object")
    return value


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a durable safetensors file, readable by whom the user's umask says (the library makes it private)."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise RunError(f"{path}: can not be written ({error})") from error
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
