"""The checkpoint store: a directory of checkpoints, each complete or invisible.

A checkpoint is built in a temporary sibling, made durable, read back and verified, and only then renamed to
`step-00000100/`; one that is no longer kept is renamed away before its files go. So a kill at any moment leaves only
whole checkpoints under their names, and beside them at most leftovers, which the next save or start sweeps.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_lm.checkpoint.checkpoint import TENSORS_SUFFIX, Checkpoint, completion_mark, read_object
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.tensor_file import DTYPES, CheckpointError, TensorKind, write_tensors
from moe_lm.files import compact_json_bytes, json_bytes, sha256, sync_directory, write_durably

FILE_BYTES = 2 * 2**30
"""Tensors are spread over files of about this size."""

SCORE = "score"
"""Key of a checkpoint's state: how good it is by validation, lower is better, or null."""

SMALL_FILES = ("index.json", "state.json", "manifest.json", "COMPLETE")
"""What a checkpoint has besides tensors."""

_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _DELETING = ".tmp-", ".old-"
_PART = "part-{:05d}.json"


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """A box of a globally named tensor, and its values."""

    name: str
    data: Tensor
    shape: list[int]
    """Of the whole tensor."""
    offsets: list[int]
    """Where the box begins in the whole tensor."""

    @staticmethod
    def whole(name: str, tensor: Tensor) -> "TensorSlice":
        """A slice that is the whole tensor."""
        return TensorSlice(name, tensor, list(tensor.shape), [0] * tensor.dim())

    @property
    def key(self) -> str:
        """Its name within a file."""
        return self.name if list(self.data.shape) == self.shape else f"{self.name}@{','.join(map(str, self.offsets))}"


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process has written of a checkpoint."""

    tensors: dict[str, Any]
    """As in index.json, with the slices of this part alone."""
    hashes: dict[str, str]
    """SHA-256 of each of its files."""


class CheckpointStore:
    """All checkpoints of one run."""

    def __init__(self, directory: Path, config: CheckpointConfig, behind: int | None = None):
        """Name a directory; nothing is read or written.

        Args:
            directory: Of all checkpoints; need not exist.
            config: How many are kept.
            behind: See `retained`.
        """
        self.directory, self.config, self._behind = directory, config, behind

    def paths(self) -> list[Path]:
        """Checkpoints that were renamed into place, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step belongs."""
        return self.directory / f"step-{step:08d}"

    def newest(self, refused: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; `refused` is told of each newer one that does not, and why."""
        for path in reversed(self.paths()):
            try:
                return Checkpoint(path)
            except CheckpointError as error:
                refused(f"{path}: {error}")
        return None

    def open(self) -> None:
        """Make the directory, remove leftovers, and try whether checkpoints can be written at all.

        Raises:
            OSError: They can not.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self.sweep()
        probe = self.directory / f"{_WRITING}probe"
        write_durably(probe, [b"probe\n"])
        probe.unlink()

    def sweep(self) -> None:
        """Remove what a killed save or deletion left behind."""
        if not self.directory.is_dir():
            return
        for leftover in [p for p in self.directory.iterdir() if p.name.startswith((_WRITING, _DELETING))]:
            _remove(leftover)

    def save(
        self, step: int, slices: Iterable[TensorSlice], state: dict[str, Any], file_bytes: int | None = None
    ) -> Path:
        """Write a checkpoint, verify it, publish it, then delete those that are no longer kept.

        Args:
            step: What it is named by.
            slices: Boxes that together cover every tensor, each value once.
            state: JSON; `SCORE` in it decides which checkpoint is the best.
            file_bytes: About the size of a file, and so of what memory holds of slices that come one at a time; null
                means `FILE_BYTES`.

        Raises:
            OSError: It can not be written; all other checkpoints are as they were.
            CheckpointError: The disk does not give back what was written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self.sweep()
        temporary = self._temporary(step)
        try:
            temporary.mkdir()
            _complete(temporary, [_write_part(temporary, "tensors", slices, file_bytes)], state)
            Checkpoint(temporary)
        except BaseException:
            _remove(temporary)  # a full disk gets its room back
            raise
        return self._publish(step)

    def write_part(self, step: int, writer: int, slices: Iterable[TensorSlice]) -> None:
        """Write and verify one process's part of a checkpoint, which `join` completes once all have written theirs.

        Leftovers must have been swept before any process begins.

        Args:
            step: What it is named by.
            writer: Number of the process.
            slices: Boxes that those of no other process share a value with.

        Raises:
            OSError: It can not be written; to be called again.
            CheckpointError: The disk does not give back what was written; the same.
        """
        temporary, prefix = self._temporary(step), f"tensors-{writer:05d}"
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            part = _write_part(temporary, prefix, slices)
            for name, written in part.hashes.items():
                if sha256(temporary / name) != written:
                    raise CheckpointError(f"{name} does not have the content it was written with (SHA-256 differs)")
            write_durably(temporary / _PART.format(writer), [compact_json_bytes(dataclasses.asdict(part))])
            sync_directory(temporary)
        except BaseException:
            for failed in [*temporary.glob(f"{prefix}-*"), temporary / _PART.format(writer)]:
                _remove(failed)  # a full disk gets its room back
            raise

    def join(self, step: int, writers: int, state: dict[str, Any]) -> Path:
        """Complete a checkpoint whose parts are written and verified, and do as `save` does.

        Args:
            step: What it is named by.
            writers: Number of processes.
            state: See `save`.

        Raises:
            OSError, CheckpointError: As `save` does; to be called again.
        """
        temporary = self._temporary(step)
        if not temporary.exists() and self.path(step).exists():  # a try before this one failed once it was in place
            sync_directory(self.directory)
            return self.path(step)
        for failed in SMALL_FILES:
            (temporary / failed).unlink(missing_ok=True)
        files = [temporary / _PART.format(writer) for writer in range(writers)]
        parts = [Part(**json.loads(file.read_bytes())) for file in files]
        _complete(temporary, parts, state)
        Checkpoint(temporary, verified={name for part in parts for name in part.hashes})
        final = self._publish(step)
        for file in files:  # what is left of them is named by no manifest
            _remove(final / file.name)
        return final

    def _temporary(self, step: int) -> Path:
        return self.directory / f"{_WRITING}{self.path(step).name}"

    def _publish(self, step: int) -> Path:
        """Rename a whole, verified checkpoint into place, and delete those that are no longer kept."""
        temporary, final = self._temporary(step), self.path(step)
        if final.exists():
            # One that failed verification: the run came here from an older one.
            final.rename(final.with_name(_DELETING + final.name))
        temporary.rename(final)
        sync_directory(self.directory)
        # The checkpoint stands: what can not be deleted now is no failure of it, and is tried again by the next save.
        with contextlib.suppress(OSError):
            self.sweep()
            self._delete(self._superseded(step))
        return final

    def make_room(self, step: int) -> None:
        """Delete what the checkpoint of `step` will supersede, except the newest good one; for a disk that is full."""
        good = self.newest(refused=lambda reason: None)
        if good is not None:
            self._delete([path for path in self._superseded(step) if path != good.path])

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of steps that a rewind gave up."""
        self._delete([path for path in self.paths() if step_of(path) > step])

    def _superseded(self, step: int) -> list[Path]:
        """Checkpoints that are not kept once there is one of `step`.

        Those of later steps stay out of it: they failed verification, and must not push out what was just written.
        """
        paths = [path for path in self.paths() if step_of(path) <= step]
        scores = {step_of(path): _score(path) for path in paths}
        kept = retained({*scores, step}, scores, self.config, self._behind)
        return [path for path in paths if step_of(path) not in kept]

    def _delete(self, paths: list[Path]) -> None:
        doomed = [path.with_name(_DELETING + path.name) for path in paths]
        for path, renamed in zip(paths, doomed):
            path.rename(renamed)
        if doomed:
            sync_directory(self.directory)
        for renamed in doomed:
            _remove(renamed)


def _remove(path: Path) -> None:
    """Delete a directory, a file or a link, as far as that can be done: what is left is swept another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def retained(
    steps: Iterable[int], scores: Mapping[int, float | None], config: CheckpointConfig, behind: int | None = None
) -> set[int]:
    """The steps whose checkpoints are kept, of those that there are.

    Args:
        steps: Of all checkpoints.
        scores: Of those that have one.
        config: How many are kept.
        behind: Also the newest that is at least so many steps older than the last.
    """
    steps = sorted(steps)
    kept = set(steps[-config.keep_last :])
    if behind is not None:
        kept |= set([step for step in steps if step <= steps[-1] - behind][-1:])
    if config.keep_every:
        kept |= {step for step in steps if step % config.keep_every == 0}
    known = {step: score for step in steps if (score := scores.get(step)) is not None}
    if config.keep_best and known:
        kept.add(min(known, key=lambda step: (known[step], -step)))
    return kept


def most_kept(max_steps: int, eval_interval: int, config: CheckpointConfig, rewinds: bool = False) -> int:
    """The most checkpoints that a run of so many steps keeps at a time; one of them to go back to if it rewinds."""
    saves = max_steps // config.interval + 1 if config.interval else 1
    milestones = max_steps // config.keep_every if config.keep_every else 0
    best = int(config.keep_best and eval_interval > 0)
    return min(config.keep_last + milestones + best + rewinds, saves)


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named by."""
    step = named_step(path)
    assert step is not None, path
    return step


def named_step(path: Path) -> int | None:
    """The same; null where the directory's name is none of a checkpoint in its store."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def _score(path: Path) -> float | None:
    """A checkpoint's score; null where it has none, or can not be read, which is no reason to stop a save."""
    try:
        score = read_object(path / "state.json").get(SCORE)
    except (OSError, CheckpointError):
        return None
    return score if isinstance(score, float) and math.isfinite(score) else None


def _write_part(directory: Path, prefix: str, slices: Iterable[TensorSlice], file_bytes: int | None = None) -> Part:
    """Write files of tensors."""
    part = Part({}, {})
    for number, batch in enumerate(_batches(slices, file_bytes or FILE_BYTES)):
        _write_file(directory, f"{prefix}-{number:05d}{TENSORS_SUFFIX}", batch, part)
        batch.clear()  # or it stays in memory while the next one is gathered
    return part


def _write_file(directory: Path, name: str, batch: list[TensorSlice], part: Part) -> None:
    for box in batch:
        kind = TensorKind.of(box.data)
        entry = {"dtype": DTYPES[kind.dtype], "shape": box.shape, "slices": []}
        place = {"file": name, "key": box.key, "offsets": box.offsets, "lengths": kind.shape}
        part.tensors.setdefault(box.name, entry)["slices"].append(place)
    part.hashes[name] = write_tensors(directory / name, {box.key: box.data for box in batch})


def _complete(directory: Path, parts: Iterable[Part], state: dict[str, Any]) -> None:
    """Write a checkpoint's other files, the mark last, and make all durable."""
    index: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    for part in parts:
        hashes |= part.hashes
        for name, entry in part.tensors.items():
            index.setdefault(name, {**entry, "slices": []})["slices"].extend(entry["slices"])
    for name, content in (("index.json", compact_json_bytes({"tensors": index})), ("state.json", json_bytes(state))):
        hashes[name] = write_durably(directory / name, [content])
    manifest = {name: {"bytes": os.path.getsize(directory / name), "sha256": hashes[name]} for name in sorted(hashes)}
    write_durably(directory / "manifest.json", [json_bytes(manifest)])
    sync_directory(directory)
    write_durably(directory / "COMPLETE", [completion_mark(directory)])
    sync_directory(directory)


def _batches(slices: Iterable[TensorSlice], file_bytes: int) -> Iterator[list[TensorSlice]]:
    batch: list[TensorSlice] = []
    size = 0
    seen: set[str] = set()
    for part in slices:
        assert part.key not in seen, part.key
        seen.add(part.key)
        batch.append(part)
        size += part.data.nbytes
        del part
        if size >= file_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
