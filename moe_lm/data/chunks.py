"""From a source's documents to token shards on disk, chunk by chunk, so that an interruption costs one chunk.

The files of a source are divided into units: runs of neighbouring files of some 64 MB together. Units are what many
machines share; a unit's bytes do not depend on who makes it. A unit becomes one chunk or more, each a training shard
and a validation shard of some 64 M tokens together and, written last, a JSON file that says what is in them, where
reading goes on, and whether the unit ends here.
"""

import dataclasses
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_lm.data.chat_template import ChatFormat, Refusal
from moe_lm.data.config import OnBadRow, TooLong
from moe_lm.data.documents import BadRows, Document, Split
from moe_lm.data.encode import Encoded, Encoder
from moe_lm.data.shards import ShardHeader, ShardWriter, TokenShard
from moe_lm.data.sources import Position, Source
from moe_lm.errors import InputError
from moe_lm.files import sha256, write_json

UNIT_BYTES = 64_000_000
CHUNK_TOKENS = 64_000_000
BATCH_CHARACTERS = 500_000
"""Text that is tokenized at a time: little enough to keep every worker busy and memory small."""

SIDES = ("train", "validation")


class ChangedSourceError(InputError):
    """The text is not what a set was prepared from; `what` says so without a remedy."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; {CHANGED}")
        self.what = what


CHANGED = "bring the old text back, prepare into another directory, or delete that one to prepare it anew."


class Unit(NamedTuple):
    """Files [first, stop) of a source."""

    number: int
    first: int
    stop: int


def divide(source: Source) -> list[Unit]:
    """The units of a source: a function of its files' sizes alone."""
    units: list[Unit] = []
    first = size = 0
    for index, file in enumerate(source.files):
        size += file.size
        if size >= UNIT_BYTES or index == len(source.files) - 1:
            units.append(Unit(len(units), first, index + 1))
            first, size = index + 1, 0
    return units


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The JSON file of a chunk."""

    last: bool
    """Whether the unit ends with this chunk."""
    position: Position | None
    """Where the next chunk of the unit begins to read."""
    files: list[list[Any]]
    """[name, bytes, time of change in ns, SHA-256] of every file of the unit, in its first chunk."""
    tokenizer_fingerprint: str
    settings_fingerprint: str
    """Hash of the settings and of the way the source is split: parts that differ in them are not joined."""
    documents_sha256: str
    """Over side, name and text of every document: a fingerprint of the text, whatever the tokenizer."""
    skipped: dict[str, int]
    """Rows left out, by kind."""
    shards: dict[str, ShardHeader]
    """By side."""

    @classmethod
    def load(cls, path: Path) -> "Chunk":
        """Reads the file.

        Raises:
            InputError: It is not one.
        """
        try:
            values = json.loads(path.read_bytes())
            shards = {side: ShardHeader(**header) for side, header in values.pop("shards").items()}
            return cls(**values, shards=shards)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); bring it back, or delete its directory to prepare again."
            ) from None

    def open_shard(self, directory: Path, name: str, side: str) -> TokenShard:
        """One of its shards."""
        return TokenShard(directory, f"{name}.{side}", self.shards[side])


def chunk_name(unit: Unit, number: int) -> str:
    """Name of a chunk's files, without their endings."""
    return f"{unit.number:05}-{number:03}"


def made_chunks(directory: Path, unit: Unit) -> tuple[list[Chunk], bool]:
    """The chunks of a unit that are complete, and whether they are all of it."""
    chunks: list[Chunk] = []
    while (path := directory / f"{chunk_name(unit, len(chunks))}.json").exists():
        chunks.append(Chunk.load(path))
        if chunks[-1].last:
            return chunks, True
    return chunks, False


class _Batch(NamedTuple):
    """Documents that are tokenized together."""

    sides: dict[str, list[Document]]
    position: Position | None
    skipped: Counter[str]


def make_unit(
    source: Source,
    split: Split,
    unit: Unit,
    directory: Path,
    encoder: Encoder,
    *,
    settings_fingerprint: str,
    window: int,
    form: ChatFormat | None = None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Makes the chunks of a unit that are not there yet.

    Args:
        source: Where its documents come from.
        split: Which of them are held out.
        unit: Which files.
        directory: The directory of the source's chunks.
        encoder: Tokenizes.
        settings_fingerprint: What else the chunks depend on.
        window: Batches that may be on their way at a time.
        form: How conversations are rendered; null for a source of texts.
        progress: Called with the bytes of text of each batch that is written.

    Raises:
        InputError: A file can not be read, holds a bad row, or has changed since the unit was begun.
    """
    chunks, complete = made_chunks(directory, unit)
    check_made(source, unit, chunks, encoder.fingerprint, settings_fingerprint, directory)
    if complete:
        return
    position = chunks[-1].position if chunks else [unit.first, None]
    number = len(chunks)
    files = list_files(source, unit) if number == 0 else []
    tokenized = _tokenized(_batches(source, split, position, unit.stop), encoder, form, window)
    last = False
    while not last:
        with ExitStack() as open_files:
            writers = {}
            for side in SIDES:
                writers[side] = ShardWriter(directory, f"{chunk_name(unit, number)}.{side}", encoder.vocab_size)
                open_files.push(writers[side].close)
            digest, skipped = hashlib.sha256(), Counter[str]()
            for batch, encoded in tokenized:
                skipped += batch.skipped + _refuse(batch, encoded.refusals, source, form)
                progress(_write(batch, encoded, writers, digest))
                position = batch.position or position
                if sum(writer.num_tokens for writer in writers.values()) >= CHUNK_TOKENS:
                    break
            else:
                last = True
            shards = {side: writer.finish() for side, writer in writers.items()}
        made = Chunk(
            last=last,
            position=position,
            files=files,
            tokenizer_fingerprint=encoder.fingerprint,
            settings_fingerprint=settings_fingerprint,
            documents_sha256=digest.hexdigest(),
            skipped=dict(skipped),
            shards=shards,
        )
        write_json(directory / f"{chunk_name(unit, number)}.json", dataclasses.asdict(made))
        files, number = [], number + 1


def _tokenized(
    batches: Iterator[_Batch], encoder: Encoder, form: ChatFormat | None, window: int
) -> Iterator[tuple[_Batch, Encoded]]:
    """Each batch with its tokens, in order, with up to `window` of them on their way."""
    waiting: deque[tuple[_Batch, Future[Encoded]]] = deque()
    for batch in batches:
        waiting.append((batch, encoder.submit([d.text for side in SIDES for d in batch.sides[side]], form)))
        if len(waiting) == window:
            first, future = waiting.popleft()
            yield first, encoder.result(future)
    while waiting:
        first, future = waiting.popleft()
        yield first, encoder.result(future)


def _batches(source: Source, split: Split, position: Position | None, stop: int) -> Iterator[_Batch]:
    """Documents of a unit in batches; what was skipped behind the last document comes in a batch of its own."""
    sides: dict[str, list[Document]] = {side: [] for side in SIDES}
    characters, counted = 0, Counter(source.bad.skipped)

    def skipped_since() -> Counter[str]:
        nonlocal counted
        since, counted = source.bad.skipped - counted, Counter(source.bad.skipped)
        return since

    behind = position
    for document, behind in source.read(position, stop):
        for side, part in zip(SIDES, split.sides(document)):
            if part is not None:
                sides[side].append(part)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield _Batch(sides, behind, skipped_since())
            sides, characters = {side: [] for side in SIDES}, 0
    yield _Batch(sides, behind, skipped_since())


def _refuse(batch: _Batch, refusals: Mapping[int, Refusal], source: Source, form: ChatFormat | None) -> Counter[str]:
    """Counts the conversations of a batch that can not be trained on, or ends with the first.

    Raises:
        InputError: There is one, and its policy is `error`.
    """
    skipped = Counter[str]()
    documents = [document for side in SIDES for document in batch.sides[side]]
    for number, refusal in sorted(refusals.items()):
        assert form is not None
        file, _, line = documents[number].name.rpartition(":")
        place = f"{next(str(known.path) for known in source.files if known.name == file)}, line {line}"
        if refusal.kind == "too_long" and form.too_long is TooLong.error:
            raise InputError(f"{source.option}: {place}: {refusal.complaint}.")
        # Apart from what reading counts: that is further on.
        bad = BadRows(OnBadRow.skip if refusal.kind == "too_long" else source.bad.policy, source.option)
        if not refusal.of_template:
            bad.found(refusal.kind, place, refusal.complaint)
        elif form.file is None:
            remedy = "mend or remove it, give another template as data.chat_template"
            bad.found(refusal.kind, place, refusal.complaint, remedy)
        else:
            bad.option = f"data.chat_template={form.file}"
            bad.found(refusal.kind, place, refusal.complaint, "mend the template or that row")
        skipped.update(bad.skipped)
        source.bad.first = source.bad.first or bad.first
    return skipped


def _write(batch: _Batch, encoded: Encoded, writers: dict[str, ShardWriter], digest: Any) -> int:
    """Appends a batch to both shards; returns the bytes of its text."""
    first_document = first_token = total = 0
    for side, documents in batch.sides.items():
        sizes = []
        for document in documents:
            for part in (side, document.name, document.text):
                data = part.encode("utf-8", "surrogateescape")
                digest.update(len(data).to_bytes(8, "little") + data)
            sizes.append(len(data))
        own = slice(first_document, first_document + len(documents))
        lengths = encoded.lengths[own]
        behind = first_token + int(lengths.sum())
        spans = encoded.spans
        if spans is not None:
            spans = spans[slice(*np.searchsorted(spans[:, 0], (first_token, behind)))] - first_token
        domains = [document.domain for document, length in zip(documents, lengths) if length]
        num_bytes = sum(sizes) if encoded.num_bytes is None else int(encoded.num_bytes[own].sum())
        writers[side].add(Encoded(encoded.tokens[first_token:behind], lengths[lengths > 0], spans), domains, num_bytes)
        first_document, first_token, total = own.stop, behind, total + sum(sizes)
    return total


def _files_of(source: Source, unit: Unit) -> list[tuple[str, Path]]:
    """Names and paths of the files on disk that a unit is read from."""
    own = [(file.name, file.path) for file in source.files[unit.first : unit.stop]]
    return own if own and own[0][1] in source.watched else [(str(path), path) for path in sorted(source.watched)]


def list_files(source: Source, unit: Unit) -> list[list[Any]]:
    """What is recorded of a unit's files.

    Raises:
        InputError: One can not be read.
    """
    listed = []
    for name, path in _files_of(source, unit):
        try:
            status = path.stat()
            listed.append([name, status.st_size, status.st_mtime_ns, sha256(path)])
        except OSError as error:
            raise InputError(f"{source.option}: {path} cannot be read ({error.strerror}).") from error
    return listed


def check_made(source: Source, unit: Unit, chunks: list[Chunk], tokenizer: str, settings: str, directory: Path) -> None:
    """Checks that chunks which are there already are those that would be made now.

    Raises:
        InputError: They were made with another tokenizer, other settings, or from other text.
    """
    for chunk in chunks:
        for name, made, wanted in (
            ("tokenizer", chunk.tokenizer_fingerprint, tokenizer),
            ("data", chunk.settings_fingerprint, settings),
        ):
            if made != wanted:
                what = "another tokenizer" if name == "tokenizer" else "other settings, or split in another way"
                raise InputError(f"{name}: unit {unit.number} in {directory} was made with {what}; {CHANGED}")
    check_unchanged(source, unit, chunks[0].files if chunks else [], directory)


def check_unchanged(source: Source, unit: Unit, recorded: list[list[Any]], directory: Path) -> None:
    """Compares a unit's files with what was recorded of them; the content only where size or time differ.

    Raises:
        ChangedSourceError: A file is another one than it was.
    """
    by_name = {name: (size, time, digest) for name, size, time, digest in recorded}
    files = _files_of(source, unit) if recorded else []
    if gone := by_name.keys() - {name for name, _ in files} if recorded else ():
        raise ChangedSourceError(f"{source.option}: {min(gone)} is gone since {directory} was prepared from it")
    for name, path in files:
        if name not in by_name:
            raise ChangedSourceError(f"{source.option}: {path} was not there when {directory} was prepared")
        size, time, digest = by_name[name]
        status = path.stat()
        if status.st_size != size or (status.st_mtime_ns != time and sha256(path) != digest):
            raise ChangedSourceError(f"{source.option}: {path} has changed since {directory} was prepared from it")
