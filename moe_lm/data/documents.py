"""Documents, rows that are none, and which documents are held out.

Two ways to hold text out. With 20 documents or more, one in round(1 / validation_fraction) by a hash of its name (the
path below the files' common directory, with the row's number where a file holds many), so that a document stays on its
side on every machine, and when files come or go below the same directory. With fewer (one big text file is the common
case) a hash would be a coin toss over the whole set: the last part of every document is held out instead, cut at a
line's end. Either way the side of a document depends on nothing but the document and the way, which is chosen once
from the first documents of a source: nothing has to be read ahead, nor kept.
"""

import enum
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_lm.data.config import OnBadRow
from moe_lm.errors import InputError

MIN_DOCUMENTS_FOR_HASH_SPLIT = 20

DOCUMENTS_PER_PERIOD = 20
"""How many times round(1 / fraction) documents are looked at to choose the way: a hash that holds none of so many
documents out has a probability of about e^-20."""


class Document(NamedTuple):
    """One text; `name` says where it came from, without the machine's own directories."""

    name: str
    text: str
    domain: str = ""


@dataclass
class BadRows:
    """What to do about rows that are no documents, and how many there were."""

    policy: OnBadRow
    option: str = ""
    """How the user wrote the source's paths, for messages."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows (or files) left out, by kind; empty texts too, which are no mistake."""
    first: tuple[str, str] | None = None
    """What was wrong with the first of them, and the remedy."""

    def found(self, kind: str, place: str, complaint: str, remedy: str = "mend or remove it") -> None:
        """Counts a bad row, or ends with its place.

        Raises:
            InputError: The policy is `error`.
        """
        sentence = f"{self.option}: {place}: {complaint}" if self.option else f"{place}: {complaint}"
        if self.policy is OnBadRow.error:
            raise InputError(f"{sentence}; {remedy}, or set data.on_bad_row=skip.")
        self.skipped[kind] += 1
        self.first = self.first or (sentence, remedy)

    def accept(self, text: object, place: str, what: str = "the text") -> bool:
        """Whether a value is the text of a document; what is not counts as a bad row.

        A `UnicodeDecodeError` stands for text that could not be decoded. A NUL is refused because it is the mark of
        binary files and of texts that were damaged, and because C libraries end a string there.
        """
        if text is None:
            self.found("null_text", place, f"{what} is null")
        elif isinstance(text, UnicodeDecodeError):
            self.found("invalid_utf8", place, f"{what} is not UTF-8 text (byte {text.start})")
        elif not isinstance(text, str):
            self.found("wrong_type", place, f"{what} must be a string, found {type(text).__name__}")
        elif "\0" in text:
            self.found("nul", place, f"{what} holds a NUL at character {text.index(chr(0))}")
        elif (surrogate := _first_surrogate(text)) is not None:
            self.found("lone_surrogate", place, f"{what} holds a lone surrogate at character {surrogate}")
        else:
            return True
        return False


def _first_surrogate(text: str) -> int | None:
    """Where a text has a code point that UTF-8 can not write; null if nowhere."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


class SplitWay(enum.Enum):
    """How validation text is chosen."""

    hash = "hash"
    tail = "tail"
    train_all = "train_all"
    hold_out_all = "hold_out_all"


@dataclass(frozen=True)
class Split:
    """Which side a document is on."""

    way: SplitWay
    fraction: float

    @property
    def modulus(self) -> int:
        """One document in so many is held out by its hash."""
        return round(1 / self.fraction)

    def sides(self, document: Document) -> tuple[Document | None, Document | None]:
        """What of a document is trained on, and what is held out."""
        if self.way is SplitWay.train_all:
            return document, None
        if self.way is SplitWay.hold_out_all:
            return None, document
        if self.way is SplitWay.hash:
            held_out = _name_hash(document.name) % self.modulus == 0
            return (None, document) if held_out else (document, None)
        cut = _tail_start(document.text, self.fraction)
        head, tail = document.text[:cut], document.text[cut:]
        train = document._replace(text=head) if head else None
        return train, document._replace(name=f"{document.name} (tail)", text=tail) if tail else None

    def __str__(self) -> str:
        """In words, for reports."""
        return {
            SplitWay.hash: f"one document in {self.modulus} by the SHA-256 of its name",
            SplitWay.tail: f"the last {self.fraction:.3g} of every document, cut at a line's end",
            SplitWay.train_all: "nothing",
            SplitWay.hold_out_all: "the documents of data.validation_paths",
        }[self.way]


def choose_split(documents: Iterable[Document], fraction: float) -> Split:
    """Chooses the way from the first documents of a source.

    Args:
        documents: The source's documents from its beginning; read only as far as needed.
        fraction: Share to hold out.
    """
    by_hash = Split(SplitWay.hash, fraction)
    seen = {"train": 0, "validation": 0}
    for document in documents:
        seen["train" if by_hash.sides(document)[0] else "validation"] += 1
        total = sum(seen.values())
        if total >= MIN_DOCUMENTS_FOR_HASH_SPLIT and all(seen.values()):
            return by_hash
        if total >= DOCUMENTS_PER_PERIOD * by_hash.modulus:
            break
    return Split(SplitWay.tail, fraction)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out tail begins: the line start at or before its share; the character itself where that would hold
    most of the text out (one line, or a title above one).
    """
    cut = min(len(text) - 1, round(len(text) * (1 - fraction)))
    line = text.rfind("\n", 0, cut) + 1
    return line if 2 * line >= len(text) else cut
