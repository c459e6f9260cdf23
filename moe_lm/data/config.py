"""Configuration of the data: which text, how it is split, mixed and cut into rows, and the tokenizer. Standard library
only.
"""

import dataclasses
import enum
import re
from dataclasses import dataclass, field

from moe_lm.errors import InputError

MIN_VOCAB_SIZE = 384
"""The 256 bytes, the 41 control ids (see `tokenizer_sentencepiece.py`) and some room for characters and merges."""

MIN_TRAINING_BYTES = 100_000
"""Several of the chunks that the tokenizer's trainer is fed, so that thinning out leaves some."""


class DataSource(enum.Enum):
    """Where documents come from; the member's name is what the user types."""

    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"
    chat = "chat"
    parquet = "parquet"
    arrow = "arrow"
    huggingface = "huggingface"
    prepared = "prepared"


class OnBadRow(enum.Enum):
    """What to do about a row that is no document."""

    error = "error"
    skip = "skip"


class TooLong(enum.Enum):
    """What to do about a conversation that a row has no room for."""

    error = "error"
    skip = "skip"
    cut = "cut"


class Packing(enum.Enum):
    """How documents are cut into rows."""

    sequential = "sequential"
    best_fit = "best_fit"


class TokenizerKind(enum.Enum):
    """What a tokenizer that is trained here has ids for, besides bytes and control ids."""

    bpe = "bpe"
    character = "character"


@dataclass
class SourceConfig:
    """One source of a mixture; null takes the value that `data` has."""

    source: DataSource | None = None
    """Kind of text, as `data.source`."""
    paths: list[str] = field(default_factory=list)
    """As `data.paths`."""
    text_field: str | None = None
    """As `data.text_field`."""
    domain: str | None = None
    """Domain of its documents; null takes the source's own name."""
    domain_field: str | None = None
    """Field that holds a document's domain, instead of one domain for all."""
    subset: str | None = None
    """As `data.subset`."""
    split: str | None = None
    """As `data.split`."""
    revision: str | None = None
    """As `data.revision`."""
    weight: float | None = None
    """Its share of the rows, relative to the others' weights. Null, for all sources, means in proportion to their
    size, which a stream does not know."""
    final_weight: float | None = None
    """Weight at the end of training, reached linearly; null keeps `weight`."""


@dataclass
class DataConfig:
    """Which documents to train on, which to hold out, and how rows are cut from them."""

    source: DataSource = DataSource.stdlib
    """Kind of text: `stdlib` (the .py files of the running Python's standard library, no download), `text` (each file
    is one document), `jsonl` (each line is one; also .gz and .zst), `chat` (each line is a conversation), `parquet`,
    `arrow`, `huggingface` (a data set of the Hub, or a directory that `datasets` reads) or `prepared` (directories that
    `moe-lm prepare` wrote)."""

    paths: list[str] = field(default_factory=list)
    """Files, directories or globs (`**` crosses directories) to read; for `huggingface` one name or directory, for
    `prepared` directories."""

    text_field: str = "text"
    """Name of the field that holds a document's text, where documents have fields."""

    domain: str | None = None
    """Domain of the documents, by which telemetry counts tokens; null takes the kind of source."""

    domain_field: str | None = None
    """Name of the field that holds a document's domain, instead of one domain for all."""

    domains: list[str] = field(default_factory=list)
    """For streams, which cannot look ahead: all values of `domain_field`; any other value is a bad row."""

    subset: str | None = None
    """Configuration name of a `huggingface` data set that has several."""

    split: str = "train"
    """Split of a `huggingface` data set to train on."""

    revision: str | None = None
    """Commit or tag of a `huggingface` data set of the Hub; null is the newest. Give one if a run that streams must
    keep the same text: the data set is reopened in every epoch, and when the run resumes."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """A mixture: data.sources.NAME.paths=[…], data.sources.NAME.weight=2, and so on, for each of its sources."""

    validation_fraction: float = 0.05
    """Share of the documents to hold out, above 0 and at most 0.5: one in round(1 / fraction), chosen by a hash of the
    document's name. Of a source with fewer than 20 documents, the last part of each is held out instead."""

    validation_paths: list[str] = field(default_factory=list)
    """Files, directories or globs to validate on, of the kind that `data.source` says; when given, nothing is split off
    from the rest, and a file matched by both is only validated on."""

    on_bad_row: OnBadRow = OnBadRow.error
    """`error` ends the command at the first bad row (broken JSON, a missing field, text that is not UTF-8, a truncated
    file …) and says where it is; `skip` leaves such rows out and counts them by kind."""

    sequence_length: int = 256
    """Length of a training row in tokens."""

    mask_documents: bool = True
    """Whether attention stays within a document and positions restart at each; if false, both span the row."""

    packing: Packing = Packing.sequential
    """`sequential` cuts the documents, end to end, into rows; `best_fit` keeps each document in one row where it fits
    (only documents longer than a row are split) and fills rows with the documents that fit best. Conversations (`chat`)
    are always packed so, and never split."""

    chat_template: str | None = None
    """File of the Jinja template that conversations are rendered with; null takes the tokenizer's own, or else moe-lm's
    default."""

    too_long: TooLong = TooLong.error
    """What to do about a conversation of more than sequence_length + 1 tokens: `error` names it, `skip` leaves it out,
    `cut` cuts its end off."""

    route_prompts: bool = True
    """Whether tokens of a conversation that are not the assistant's count in the balancing losses and in telemetry.
    They go through the experts either way."""

    epochs: int | None = None
    """Passes over the text. Null repeats exhausted sources until the run ends; a number ends the run when the first
    source has been read that many times, unless `trainer.max_steps` ends it earlier."""

    streaming: bool = False
    """Tokenize while training, without preparing shards first: for text too large to prepare, or without end."""

    num_streams: int = 12
    """Virtual streams that documents are dealt to when streaming: the number of processes must divide it, and may
    change within that when a run goes on."""

    workers: int | None = None
    """Processes that tokenize beside each training process, or for `prepare`; null is one for streaming and one per
    core to prepare; 0 tokenizes without further processes."""

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
        if not 1 <= self.num_streams <= 1024:
            raise InputError(f"data.num_streams={self.num_streams}: must be between 1 and 1024.")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"data.epochs={self.epochs}: must be at least 1, or null to repeat without end.")
        if self.workers is not None and not 0 <= self.workers <= 1024:
            raise InputError(f"data.workers={self.workers}: must be between 0 and 1024, or null.")
        if self.domain == "":
            raise InputError("data.domain='': give a name, or null for the kind of source.")
        self._check_sources()
        self._check_chat()
        if self.source is DataSource.prepared and self.streaming:
            raise InputError("data.streaming=true: data.source=prepared is tokenized already; leave one of them out.")
        for name, source in self.resolved_sources().items():
            _check_source(name, source, self)
        if self.validation_paths and self.source in (DataSource.stdlib, DataSource.prepared):
            raise InputError(
                f"data.validation_paths={list(self.validation_paths)}: data.source={self.source.name} reads none; "
                "set data.source to their kind, and give what to train on as data.sources."
            )

    def _check_sources(self) -> None:
        """Checks the names and weights of a mixture."""
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
                raise InputError(f"data.sources.{name}: name a source with letters, digits, '_' and '-'.")
        if self.sources and self.paths and self.source is not DataSource.prepared:
            raise InputError(
                f"data.paths={list(self.paths)}: with data.sources each source has its own paths; "
                "give them as data.sources.NAME.paths."
            )
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if self.source is DataSource.prepared:
            for name, source in self.sources.items():
                for f in dataclasses.fields(source):
                    if f.name not in ("weight", "final_weight") and getattr(source, f.name) not in (None, []):
                        raise InputError(
                            f"data.sources.{name}.{f.name}={getattr(source, f.name)}: of a source in a prepared set "
                            "only weight and final_weight can be given; its text was chosen when it was prepared."
                        )
        for name, source in self.sources.items():
            for field_name in ("weight", "final_weight"):
                value = getattr(source, field_name)
                if value is not None and value < 0:
                    raise InputError(f"data.sources.{name}.{field_name}={value}: must not be negative.")
            if source.final_weight is not None and source.weight is None:
                raise InputError(f"data.sources.{name}.final_weight={source.final_weight}: needs a weight to begin at.")
            if weighted and source.weight is None:
                raise InputError(
                    f"data.sources.{name}.weight=null: data.sources.{weighted[0]} has a weight, so every source "
                    "needs one."
                )
        if len(self.sources) > 1 and self.streaming and not weighted:
            raise InputError(
                f"data.sources.{next(iter(self.sources))}.weight=null: a stream does not know its length; "
                "give every source a weight."
            )

    def _check_chat(self) -> None:
        """Checks what only conversations have."""
        if self.chat_template == "":
            raise InputError("data.chat_template='': give a file, or null for the tokenizer's own.")
        if self.chat_template is not None and not self.has_chat:
            raise InputError(
                f"data.chat_template={self.chat_template}: data.source={self.source.name} is not rendered by a "
                "template; leave it out, or set data.source=chat."
            )
        if self.streaming and self.has_chat:
            raise InputError("data.streaming=true: conversations are prepared, not streamed; leave it out.")

    @property
    def kinds(self) -> set[DataSource | None]:
        """The kinds of all sources, and of what is validated on."""
        of_validation = {self.source} if self.validation_paths else set()
        return {source.source for source in self.resolved_sources().values()} | of_validation

    @property
    def has_chat(self) -> bool:
        """Whether any source, or the validation's, holds conversations that are still to be rendered."""
        return DataSource.chat in self.kinds

    def resolved_sources(self) -> dict[str, SourceConfig]:
        """The sources by name, each with its kind, fields and domain filled in; a single source is named by its
        kind. For `prepared`, the sources' names and domains are those of the prepared sets.
        """
        whole = SourceConfig(
            source=self.source,
            paths=self.paths,
            text_field=self.text_field,
            domain=self.domain,
            domain_field=self.domain_field,
            subset=self.subset,
            split=self.split,
            revision=self.revision,
        )
        if not self.sources or self.source is DataSource.prepared:
            return {self.source.name: dataclasses.replace(whole, domain=self.domain or self.source.name)}
        filled = {}
        for name in sorted(self.sources):
            own = self.sources[name]
            given = {f.name: getattr(own, f.name) for f in dataclasses.fields(own) if getattr(own, f.name) is not None}
            inherited = dataclasses.replace(whole, **{"domain": self.domain or name, **given})
            # A domain of the source's own goes before a field that only the others share.
            filled[name] = inherited if own.domain is None else dataclasses.replace(inherited, domain_field=None)
        return filled

    def option(self, name: str, field_name: str) -> str:
        """How the user writes a field of a resolved source."""
        return f"data.sources.{name}.{field_name}" if name in self.sources else f"data.{field_name}"


def _check_source(name: str, source: SourceConfig, config: DataConfig) -> None:
    """Checks a source whose fields are filled in."""
    paths, kind = config.option(name, "paths"), source.source
    assert kind is not None
    if not source.text_field:
        raise InputError(
            f"{config.option(name, 'text_field')}='': must name the field that holds the text, such as 'text'."
        )
    for field_name in ("domain", "domain_field"):
        if getattr(source, field_name) == "":
            raise InputError(f"{config.option(name, field_name)}='': give a name, or null.")
    if kind is DataSource.stdlib:
        if source.paths:
            raise InputError(
                f"{paths}={list(source.paths)}: data.source=stdlib reads no paths; "
                "set data.source=text or data.source=jsonl to read these."
            )
    elif not source.paths:
        raise InputError(
            f"{paths}=[]: data.source={kind.name} needs at least one "
            + {"huggingface": "name of a data set or directory.", "prepared": "directory of `moe-lm prepare`."}.get(
                kind.name, "file, directory or glob."
            )
        )
    if name in config.sources and config.source is not DataSource.prepared and kind is DataSource.prepared:
        raise InputError(
            f"{config.option(name, 'source')}=prepared: prepared sets are not mixed with text; "
            "give data.source=prepared and their directories as data.paths."
        )
    if kind is DataSource.huggingface and len(source.paths) != 1:
        raise InputError(f"{paths}={list(source.paths)}: one name or directory of a data set; use data.sources to mix.")
    if config.streaming and source.domain_field is not None and not config.domains:
        raise InputError(
            f"{config.option(name, 'domain_field')}={source.domain_field}: a stream can not look ahead; "
            "list every domain in data.domains."
        )


@dataclass
class TokenizerConfig:
    """The tokenizer: trained on the training documents (sentencepiece), or taken from a file or directory."""

    kind: TokenizerKind = TokenizerKind.bpe
    """`bpe` merges characters into the pieces that the text repeats most; `character` makes each character one token.
    Ignored when `path` is given, or the data is prepared already."""

    vocab_size: int = 4096
    """Number of token ids in all, control and byte ids included. Of kind `character` the most there may be: if the text
    has more characters, the rarest are spelt in bytes; if fewer (384 is enough for English), the model has spare
    rows. Ignored when `path` is given."""

    path: str | None = None
    """An existing tokenizer to use instead of training one: a sentencepiece `.model`, or a Hugging Face directory with
    tokenizer.model or tokenizer.json."""

    training_bytes: int = 32_000_000
    """Most UTF-8 bytes of text the tokenizer is trained on; more text is thinned out evenly. A stream is not read to
    its end for that: this much of its beginning is taken."""

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
            raise InputError(
                "tokenizer.path='': give a sentencepiece .model file or a directory, or null to train one."
            )
