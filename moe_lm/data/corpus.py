"""Documents: read from the standard library, text files or JSONL, and split into training and validation.

Two ways to hold text out. With 20 documents or more, one in round(1 / validation_fraction) by a hash of its name (the
path below the files' common directory, with the line number for JSONL), so that a document stays on its side on every
machine, and when files come or go below the same directory. With fewer (one big text file is the
common case) a hash would be a coin toss over the whole set: the last part of every document is held out instead,
cut at a line's end.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_lm.data.config import DataConfig, DataSource
from moe_lm.errors import InputError

MIN_DOCUMENTS_FOR_HASH_SPLIT = 20

STDLIB_EXCLUDED_PARTS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text; `name` says where it came from, without the machine's own directories."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """What was read, and how it was split."""

    train: list[Document]
    validation: list[Document]
    fingerprint: str
    """SHA-256 (hex) over side, name and text of every document in order: figures compare only where it is equal."""
    split: str
    """How the validation text was chosen, in words for reports."""
    num_skipped: int
    """Files left out because they are not UTF-8 (only the standard library skips; elsewhere that is an error)."""


def read_documents(config: DataConfig) -> Corpus:
    """Reads all documents of a configuration and splits them.

    Raises:
        InputError: A path is missing or matches nothing, a file is not UTF-8 or not valid JSONL, or there is no text.
    """
    num_skipped = 0
    if config.source is DataSource.stdlib:
        documents, num_skipped = read_stdlib(Path(sysconfig.get_path("stdlib")))
        train, validation, split = split_documents(documents, config.validation_fraction)
    elif config.validation_paths:
        validation_files = _expand(config.validation_paths, "data.validation_paths", config.source)
        held_out = set(validation_files)
        files = _expand(config.paths, "data.paths", config.source)
        train = list(_read_files([path for path in files if path not in held_out], "data.paths", config))
        validation = list(_read_files(validation_files, "data.validation_paths", config))
        split = "the documents of data.validation_paths"
        for name, side in (("paths", train), ("validation_paths", validation)):
            if not side:
                raise InputError(f"data.{name}={list(getattr(config, name))}: there is no text left to read in them.")
    else:
        files = _expand(config.paths, "data.paths", config.source)
        documents = list(_read_files(files, "data.paths", config))
        if not documents:
            raise InputError(f"data.paths={list(config.paths)}: all files are empty; give files with text.")
        train, validation, split = split_documents(documents, config.validation_fraction)
    return Corpus(train, validation, _fingerprint(train, validation), split, num_skipped)


def read_stdlib(root: Path) -> tuple[list[Document], int]:
    """Reads a standard library's .py files, without test packages and installed packages.

    Args:
        root: The library's directory (inside a virtual environment: that of the Python it was made from).

    Returns:
        The non-empty documents in sorted order of their relative paths, and the number of files that are not UTF-8.

    Raises:
        InputError: There is no source text there (some distributions ship compiled files only).
    """
    documents: list[Document] = []
    num_skipped = 0
    relative_paths = [path.relative_to(root) for path in root.rglob("*.py")]
    for relative in sorted(relative_paths, key=lambda path: path.as_posix()):
        if STDLIB_EXCLUDED_PARTS.intersection(relative.parts):
            continue
        try:
            text = (root / relative).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            num_skipped += 1
            continue
        if text:
            documents.append(Document(relative.as_posix(), text))
    if not documents:
        raise InputError(
            f"data.source=stdlib: this Python has no .py files under {root}; "
            "set data.source=text and data.paths to text of your own."
        )
    return documents, num_skipped


def split_documents(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document], str]:
    """Splits documents into training and validation (see the module's docstring).

    Returns:
        Training documents, validation documents, and how they were split in words.

    Raises:
        InputError: The text is too short to hold anything out.
    """
    modulus = round(1 / fraction)
    if len(documents) >= MIN_DOCUMENTS_FOR_HASH_SPLIT:
        # The rule of the project's first measurements (gzip 1.93, xz 1.59 bits per byte): keep figures comparable.
        validation = [document for document in documents if _name_hash(document.name) % modulus == 0]
        train = [document for document in documents if _name_hash(document.name) % modulus != 0]
        if train and validation:
            return train, validation, f"one document in {modulus} by the SHA-256 of its name"
    train, validation = [], []
    for document in documents:
        cut = _tail_start(document.text, fraction)
        if cut > 0:
            train.append(Document(document.name, document.text[:cut]))
        if cut < len(document.text):
            validation.append(Document(f"{document.name} (tail)", document.text[cut:]))
    if not train or not validation:
        raise InputError(
            f"data.validation_fraction={fraction}: {sum(len(d.text) for d in documents)} characters are too few "
            "to hold any out; give more text, or data.validation_paths."
        )
    return train, validation, f"the last {fraction:.3g} of every document, cut at a line's end"


def _name_hash(name: str) -> int:
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest(), 16)


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out tail begins: the line start at or before its share, else (one line) the character."""
    cut = min(len(text) - 1, round(len(text) * (1 - fraction)))
    return text.rfind("\n", 0, cut) + 1 or cut


def _fingerprint(train: Iterable[Document], validation: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for side, documents in (("train", train), ("validation", validation)):
        for document in documents:
            for part in (side, document.name, document.text):
                data = part.encode("utf-8", "surrogateescape")
                digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _expand(patterns: Iterable[str], field_name: str, source: DataSource) -> list[Path]:
    """The files behind files, directories and globs: each once, sorted.

    A directory stands for the files beneath it that are not hidden (with `jsonl`: those named *.jsonl).
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            ending = ".jsonl" if source is DataSource.jsonl else ""
            matches = _files(str(Path(glob.escape(str(path))) / f"**/*{ending}"))
            if not matches:
                raise InputError(
                    f"{field_name}: the directory '{pattern}' holds no {f'{ending} files' if ending else 'file'}."
                )
        elif glob.has_magic(pattern):
            matches = _files(str(path))
            if not matches:
                raise InputError(f"{field_name}: '{pattern}' matches no file.")
        else:
            raise InputError(f"{field_name}: '{pattern}' does not exist (looked from {Path.cwd()}).")
        found.update(dict.fromkeys(match.resolve() for match in matches))
    return sorted(found)


def _files(pattern: str) -> list[Path]:
    return [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]


def _read_files(files: list[Path], field_name: str, config: DataConfig) -> Iterator[Document]:
    """Yields the non-empty documents of files; names are relative to the files' common directory."""
    if not files:
        return
    common = Path(os.path.commonpath([path.parent for path in files]))
    for path in files:
        try:
            # Bytes, not text mode: universal newlines would turn "\r\n" into "\n".
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{field_name}: {path} is not UTF-8 text (byte {error.start}); convert it, or leave it out with a glob."
            ) from None
        except OSError as error:
            raise InputError(f"{field_name}: {path} cannot be read ({error.strerror}).") from None
        name = path.relative_to(common).as_posix()
        if config.source is DataSource.jsonl:
            yield from _read_jsonl(text, f"{field_name}: {path}", name, config.text_field)
        elif text:
            yield Document(name, text)


def _read_jsonl(content: str, source: str, name: str, text_field: str) -> Iterator[Document]:
    """Yields a document per non-blank line, named "file:line". Blank texts are left out."""
    # Not splitlines(): it also splits at U+2028 and others, which may stand unescaped inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not valid JSON ({error}); mend or remove the line.") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: a JSON object is needed, found {type(row).__name__}.")
        if text_field not in row:
            fields = ", ".join(sorted(row)) or "none"
            raise InputError(f"{place}: no field '{text_field}' (its fields: {fields}); set data.text_field.")
        text = row[text_field]
        if not isinstance(text, str):
            raise InputError(f"{place}: the field '{text_field}' must be a string, found {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place}: the field '{text_field}' holds a lone surrogate at character {error.start}, "
                "which is not text; mend or remove the line."
            ) from None
        if text:
            yield Document(f"{name}:{number}", text)
