"""Configuration of the data: which text, how it is split, and the tokenizer. Standard library only."""

import enum
from dataclasses import dataclass, field

from moe_lm.errors import InputError

MIN_VOCAB_SIZE = 384
"""The 256 bytes, the 41 control ids (see `tokenizer.py`) and some room for characters and merges."""

MIN_TRAINING_BYTES = 100_000
"""Several of the chunks that the tokenizer's trainer is fed, so that thinning out leaves some."""


class DataSource(enum.Enum):
    """Where documents come from; the member's name is what the user types."""

    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"


@dataclass
class DataConfig:
    """Which documents to train on, which to hold out, and how rows are cut from them."""

    source: DataSource = DataSource.stdlib
    """Kind of text: `stdlib` (the .py files of the running Python's standard library, no download), `text` (each file
    is one document) or `jsonl` (each line is one document)."""

    paths: list[str] = field(default_factory=list)
    """Files, directories or globs (`**` crosses directories) to read for `text` and `jsonl`."""

    text_field: str = "text"
    """Name of the field that holds a document's text in `jsonl`."""

    validation_fraction: float = 0.05
    """Share of the documents to hold out, above 0 and at most 0.5: one in round(1 / fraction), chosen by a hash of the
    document's name. With fewer than 20 documents, the last part of every document is held out instead."""

    validation_paths: list[str] = field(default_factory=list)
    """Files, directories or globs to validate on; when given, nothing is split off from `paths`, and a file matched by
    both is only validated on."""

    sequence_length: int = 256
    """Length of a training row in tokens."""

    mask_documents: bool = True
    """Whether attention stays within a document and positions restart at each; off, a row is one run of text."""

    def __post_init__(self) -> None:
        """Checks each field by itself and the fields against each other.

        Raises:
            InputError: A value is out of range, or paths do not fit the source.
        """
        if not 0.0 < self.validation_fraction <= 0.5:
            raise InputError(
                f"data.validation_fraction={self.validation_fraction}: must be above 0 and at most 0.5; "
                "0.05 holds out one document in 20."
            )
        if self.sequence_length < 2:
            raise InputError(f"data.sequence_length={self.sequence_length}: must be at least 2 tokens.")
        if not self.text_field:
            raise InputError("data.text_field='': must name the field that holds the text, such as 'text'.")
        if self.source is DataSource.stdlib:
            for name, paths in (("paths", self.paths), ("validation_paths", self.validation_paths)):
                if paths:
                    raise InputError(
                        f"data.{name}={list(paths)}: data.source=stdlib reads no paths; "
                        "set data.source=text or data.source=jsonl to read these."
                    )
        elif not self.paths:
            raise InputError(
                f"data.paths=[]: data.source={self.source.name} needs at least one file, directory or glob."
            )


@dataclass
class TokenizerConfig:
    """The sentencepiece tokenizer: trained on the training documents, or taken from a file."""

    vocab_size: int = 4096
    """Number of token ids in all, control and byte ids included. Ignored when `path` is given."""

    path: str | None = None
    """An existing sentencepiece `.model` to use instead of training one."""

    training_bytes: int = 32_000_000
    """Most UTF-8 bytes of text the tokenizer is trained on; more text is thinned out evenly."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: A value is out of range.
        """
        if not MIN_VOCAB_SIZE <= self.vocab_size <= 1_000_000:
            raise InputError(
                f"tokenizer.vocab_size={self.vocab_size}: must be between {MIN_VOCAB_SIZE} (bytes and control ids "
                "need room) and 1000000."
            )
        if self.training_bytes < MIN_TRAINING_BYTES:
            raise InputError(
                f"tokenizer.training_bytes={self.training_bytes}: must be at least {MIN_TRAINING_BYTES} bytes."
            )
        if self.path == "":
            raise InputError("tokenizer.path='': give a sentencepiece .model file, or null to train one.")
