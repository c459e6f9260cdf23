"""Sources: where documents come from, in an order that never changes, readable from any position.

A source is a list of files and a reader for their format (`formats.py`); a data set of the Hub counts as one file. A
position is the JSON value [file, offset]: what was read up to it is not read again, and nothing behind it is missed.
"""

import glob
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lm.data.chat import read_conversation
from moe_lm.data.config import DataConfig, DataSource, OnBadRow, SourceConfig
from moe_lm.data.documents import BadRows, Document
from moe_lm.data.formats import Offset, Reader, Row, read_arrow, read_jsonl, read_parquet, read_text
from moe_lm.errors import InputError, in_one_line

STDLIB_EXCLUDED_PARTS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = {
    DataSource.text: ("",),
    DataSource.jsonl: JSON_LINES,
    DataSource.chat: JSON_LINES,
    DataSource.parquet: (".parquet",),
    DataSource.arrow: (".arrow",),
}
"""Of a directory, which files are read."""

HUB_STATE_EVERY = 256
"""Rows between two states that are asked of `datasets`: each one is a nested dictionary."""

Position = list[Any]
"""[index of a file, offset within it], JSON."""


@dataclass(frozen=True)
class SourceFile:
    """A file, and its name below the directory that all files of its source share."""

    path: Path
    name: str
    size: int


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order."""

    name: str
    option: str
    """How the user writes its paths, for messages."""
    files: list[SourceFile]
    reader: Reader
    fields: list[str]
    """Names of the fields of text (in conversations: of messages) and, if there is one, of the domain."""
    domain: str
    """Domain of every document, where no field says it."""
    domains: list[str]
    """All values that the domain's field may have; empty where any may come."""
    bad: BadRows
    watched: list[Path]
    """The files on disk whose change is a change of the source."""
    is_chat: bool = False
    """Whether its documents are conversations."""

    def read(self, position: Position | None = None, stop: int | None = None) -> Iterator[tuple[Document, Position]]:
        """Documents from a position on, each with the position behind it.

        Args:
            position: Where an earlier reading had come to; null is the beginning.
            stop: Index of the first file that is not read any more.

        Raises:
            InputError: A file can not be read, or holds a bad row and the policy is `error`.
        """
        first, offset = position or (0, None)
        for index in range(first, len(self.files) if stop is None else stop):
            file = self.files[index]
            try:
                for row, behind in self.reader(file.path, offset, self.fields, self.bad):
                    document = self._document(file, row)
                    if document is not None:
                        yield document, [index, behind]
            except OSError as error:
                raise InputError(f"{self.option}: {file.path} cannot be read ({error.strerror or error}).") from None
            offset = None

    def _document(self, file: SourceFile, row: Row) -> Document | None:
        """The document of a row; null for a bad row, and for an empty text."""
        if self.is_chat:
            conversation = read_conversation(row.fields, row.place, self.bad)
            domain = self._domain(row) if conversation is not None else None
            return Document(f"{file.name}{row.name}", conversation, domain) if conversation and domain else None
        text_field = self.fields[0]
        if text_field not in row.fields:
            there = ", ".join(sorted(row.fields)) or "none"
            complaint = f"no field '{text_field}' (its fields: {there})"
            self.bad.found("missing_field", row.place, complaint, "mend or remove it, set the text field")
            return None
        text = row.fields[text_field]
        if not self.bad.accept(text, row.place, f"the field '{text_field}'" if row.name else "the text"):
            return None
        domain = self._domain(row)
        if domain is None:
            return None
        if not text:
            self.bad.skipped["empty_text"] += 1  # no mistake, but nothing to learn from
            return None
        return Document(f"{file.name}{row.name}", text, domain)

    def _domain(self, row: Row) -> str | None:
        """A row's domain; null, as a bad row, where its field says none."""
        if len(self.fields) == 1:
            return self.domain
        name = self.fields[1]
        if name not in row.fields:
            self.bad.found("missing_field", row.place, f"no field '{name}' to say its domain")
            return None
        domain = row.fields[name]
        if not self.bad.accept(domain, row.place, f"the field '{name}'"):
            return None
        if self.domains and domain not in self.domains:
            self.bad.found("unknown_domain", row.place, f"'{name}' is {domain!r}, which is not among data.domains")
            return None
        return str(domain)


@dataclass(frozen=True)
class Beginning(Source):
    """The first documents of a source, in memory: what is known of a stream before training begins."""

    documents: list[Document] = field(default_factory=list)

    def read(self, position: Position | None = None, stop: int | None = None) -> Iterator[tuple[Document, Position]]:
        """The documents from a position on."""
        first = (position or (0, None))[1] or 0
        for index in range(first, len(self.documents)):
            yield self.documents[index], [0, index + 1]


def beginning_of(source: Source, num_bytes: int) -> Beginning:
    """Reads the documents of a source up to that many bytes of text."""
    documents: list[Document] = []
    size = 0
    for document, _ in source.read():
        documents.append(document)
        size += len(document.text.encode())
        if size >= num_bytes:
            break
    whole = {**vars(source), "files": [SourceFile(source.files[0].path, source.name, size)], "watched": []}
    return Beginning(**whole, documents=documents)


def open_sources(config: DataConfig, without: "Source | None" = None) -> list[Source]:
    """The training sources of a configuration, in order of their names.

    Args:
        config: Which text.
        without: A source whose files are left out: what is validated on is not trained on.

    Raises:
        InputError: A path is missing or matches nothing.
    """
    held_out = {file.path.resolve() for file in without.files} if without is not None else set()
    sources: list[tuple[Source, set[tuple[Path, tuple[str | None, ...]]]]] = []
    for name, source in config.resolved_sources().items():
        opened = _open(name, source, config, config.option(name, "paths"), held_out)
        if not opened.files:
            taken = " beside data.validation_paths" if held_out else ""
            raise InputError(f"{opened.option}={list(source.paths)}: there is no text left to read in them{taken}.")
        paths = {(file.path.resolve(), _part_read(source)) for file in opened.files}
        for other, of_other in sources:
            if both := paths & of_other:
                raise InputError(
                    f"{opened.option}: {min(path for path, _ in both)} is in {other.option} too, and might be held "
                    "out of one and trained on in the other; give each file to one source, and weigh the sources."
                )
        sources.append((opened, paths))
    return [source for source, _ in sources]


def _part_read(source: SourceConfig) -> tuple[str | None, ...]:
    """What of a data set's directory or name a source reads: of `datasets`, its subset and split, as far as
    `_load_dataset` looks at them.
    """
    if source.source is not DataSource.huggingface:
        return ()
    path = os.path.expanduser(source.paths[0])
    if os.path.exists(os.path.join(path, "state.json")):
        return ()
    if os.path.exists(os.path.join(path, "dataset_dict.json")):
        return (source.split,)
    return source.subset, source.split


def open_validation(config: DataConfig) -> Source | None:
    """The source of `data.validation_paths`; null where there are none."""
    if not config.validation_paths:
        return None
    source = SourceConfig(
        source=config.source,
        paths=config.validation_paths,
        text_field=config.text_field,
        domain=config.domain or config.source.name,
        domain_field=None if config.sources else config.domain_field,
        subset=config.subset,
        split=config.split,
        revision=config.revision,
    )
    return _open("validation", source, config, "data.validation_paths", set())


def _open(name: str, source: SourceConfig, config: DataConfig, option: str, held_out: set[Path]) -> Source:
    """A source whose configuration is filled in."""
    kind = source.source
    assert kind is not None and kind is not DataSource.prepared and source.text_field is not None
    reader: Reader = read_text
    bad = BadRows(OnBadRow.skip if kind is DataSource.stdlib else config.on_bad_row, option)
    if kind is DataSource.stdlib:
        files = stdlib_files(Path(sysconfig.get_path("stdlib")))
        watched = [file.path for file in files]
    elif kind is DataSource.huggingface:
        if len(source.paths) != 1:
            raise InputError(f"{option}={list(source.paths)}: give one name or directory of a data set.")
        path = os.path.expanduser(source.paths[0])
        is_local = os.path.isdir(path)
        if is_local and source.revision is not None:
            name = f"{option.removesuffix('paths')}revision"
            raise InputError(f"{name}={source.revision}: {path} is a directory, which has no revisions; leave it out.")
        files = [SourceFile(Path(path), Path(path).resolve().name if is_local else path, 0)]
        files = [file for file in files if file.path.resolve() not in held_out]
        reader = _huggingface_reader(path, source, option)
        watched = _files(os.path.join(glob.escape(path), "**", "*")) if is_local else []
    else:
        readers = dict.fromkeys((DataSource.jsonl, DataSource.chat), read_jsonl)
        readers |= {DataSource.parquet: read_parquet, DataSource.arrow: read_arrow}
        reader = readers.get(kind, reader)
        paths = [path for path in expand(source.paths, option, kind, bad) if path.resolve() not in held_out]
        common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
        files = [SourceFile(path, path.relative_to(common).as_posix(), path.stat().st_size) for path in paths]
        watched = paths
    has_fields = kind not in (DataSource.stdlib, DataSource.text)
    fields = [source.text_field, *([source.domain_field] if source.domain_field and has_fields else [])]
    assert source.domain is not None
    is_chat = kind is DataSource.chat
    return Source(name, option, files, reader, fields, source.domain, config.domains, bad, watched, is_chat)


def stdlib_files(root: Path) -> list[SourceFile]:
    """A standard library's .py files, without test packages, installed packages and empty files.

    Args:
        root: The library's directory (inside a virtual environment: that of the Python it was made from).

    Raises:
        InputError: There is no source text there (some distributions ship compiled files only).
    """
    files: list[SourceFile] = []
    for directory, subdirectories, names in os.walk(root):
        # Not entered at all: installed packages are many times as many files as the library.
        subdirectories[:] = [name for name in subdirectories if name not in STDLIB_EXCLUDED_PARTS]
        paths = [Path(directory, name) for name in names if name.endswith(".py")]
        files += [SourceFile(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    files = sorted((file for file in files if file.size), key=lambda file: file.name)
    if not files:
        raise InputError(
            f"data.source=stdlib: this Python has no .py files under {root}; "
            "set data.source=text and data.paths to text of your own."
        )
    return files


def expand(patterns: list[str], option: str, kind: DataSource, bad: BadRows) -> list[Path]:
    """The files behind files, directories and globs: each once, sorted.

    A directory stands for the files beneath it that are not hidden and have one of the format's endings. A link to a
    file keeps its own name, since the ending says the format.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            _check_readable(path, option)
            every = _files(str(Path(glob.escape(str(path))) / "**" / "*"))
            matches = [match for match in every if match.name.endswith(ENDINGS[kind])]
            if not matches:
                wanted = " or ".join(filter(None, ENDINGS[kind]))
                holds = f"holds no {wanted} file" if wanted else "holds no file"
                bad.found("no_match", f"the directory '{pattern}'", holds, "give another")
        elif glob.has_magic(pattern):
            matches = _files(str(path))
            if not matches:
                bad.found("no_match", f"'{pattern}'", "matches no file", "give another")
        else:
            wrong = "is neither a file nor a directory" if path.exists() else "does not exist"
            raise InputError(f"{option}: '{pattern}' {wrong} (looked from {Path.cwd()}).")
        for match in matches:
            found.setdefault(match.resolve(), Path(os.path.abspath(match)))
    return sorted(found.values())


def _check_readable(root: Path, option: str) -> None:
    """Refuse a directory of which something can not be listed: a glob would pass over it without a word.

    Raises:
        InputError: There is one, and it is not hidden.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{option}: {error.filename} can not be listed ({error.strerror}); make it readable, or give what is "
            "beside it alone."
        ) from error

    for _, subdirectories, _ in os.walk(root, onerror=refuse):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]


def _files(pattern: str) -> list[Path]:
    """The files behind a glob, sorted: a directory's own order differs between machines."""
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]


def _huggingface_reader(path: str, source: SourceConfig, option: str) -> Reader:
    """Reads a data set of the Hub, or a local directory in its layout or as `save_to_disk` leaves it.

    An offset is [state of `datasets` at a row, that row's number, number of the row to go on at].
    """

    def read(_: Path, offset: Offset, fields: list[str], bad: BadRows) -> Iterator[tuple[Row, Offset]]:
        dataset = _load_dataset(path, source, option)
        state, base, first = offset or (None, 0, 0)
        if state is not None:
            dataset.load_state_dict(state)
        names = list(dataset.features) if dataset.features is not None else None
        if names is not None and fields[0] not in names:
            there = ", ".join(sorted(names))
            raise InputError(
                f"{option.removesuffix('paths')}text_field={fields[0]}: {path} has no such column (its columns: "
                f"{there}); name the one that holds the text."
            )
        rows = iter(dataset)
        number = base
        while True:
            if number % HUB_STATE_EVERY == 0 and number >= first:
                state, base = dataset.state_dict(), number
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # whatever the format's own reader, or the network, raises
                bad.found("damaged_file", f"{path}, row {number}", f"can not be read further ({in_one_line(error)})")
                return
            number += 1
            if number > first:
                yield Row(f"{path}, row {number - 1}", f":{number - 1}", row), [state, base, number]
        if number == 0:
            bad.found("empty_file", path, "the data set holds no row", "give another")

    return read


def _load_dataset(path: str, source: SourceConfig, option: str) -> Any:
    """An iterable data set of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.logging.set_verbosity_error()
    prefix = option.removesuffix("paths")
    split = f"{prefix}split={source.split}"
    chosen = split if source.subset is None else f"{prefix}subset={source.subset}, {split}"
    try:
        if any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            if isinstance(saved, dict):
                if source.split not in saved:
                    raise InputError(f"{split}: {path} has the splits {', '.join(sorted(saved))}; choose one of them.")
                saved = saved[source.split]
            elif source.split not in ("train", str(saved.split)):
                raise InputError(f"{split}: {path} is one split, saved as {saved.split}; leave data.split out.")
            return saved.to_iterable_dataset()
        return datasets.load_dataset(path, source.subset, split=source.split, revision=source.revision, streaming=True)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{chosen}: {path} can not be opened so ({in_one_line(error)}).") from error
    except Exception as error:  # no network, no such data set, no permission, a broken file: each its own type
        raise InputError(f"{option}=[{path}]: this data set can not be opened ({in_one_line(error)}).") from error
