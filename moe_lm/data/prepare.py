"""Text to tokenizer and token shards, once; later calls load what is there. The files:

DIRECTORY/tokenizer/              tokenizer.model (or tokenizer.json) and transformers' files
DIRECTORY/data/SOURCE/            the chunks of each source (`chunks.py`); of a stream, of its held-out text only
DIRECTORY/data/validation.paths/  the chunks of data.validation_paths
DIRECTORY/data/begun.json         the settings, written first, so that an interrupted preparation goes on as the same
DIRECTORY/data/manifest.json      settings, fingerprints, counts, the chunks' hashes; last, as the mark of completion

Whatever is made is a function of text and settings alone: interrupted or not, by one process or many, on one machine
or, each taking a part of the units, on several that join their chunks in one directory.
"""

import contextlib
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lm.data.chat_template import ChatFormat, choose_template
from moe_lm.data.chunks import ChangedSourceError, made_chunks
from moe_lm.data.config import DataConfig, TokenizerConfig, TokenizerKind
from moe_lm.data.documents import MIN_DOCUMENTS_FOR_HASH_SPLIT, Split, SplitWay, choose_split
from moe_lm.data.encode import Encoder, start_workers
from moe_lm.data.prepared import FORMAT, made_tokenizer, open_set
from moe_lm.data.settings import check_begun, check_sources, settings_of, sizes_of
from moe_lm.data.sources import Source, beginning_of, open_sources, open_validation
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.data.tokenizer_sentencepiece import train_tokenizer
from moe_lm.data.work import Progress, all_work, as_source, fingerprints_of, join, make_chunks
from moe_lm.errors import InputError
from moe_lm.files import write_json

STALE_SECONDS = 24 * 3600
"""Age at which a temporary file belongs to nobody any more."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """Which slice of the work this process does: `index` of `total`, from 1."""

    index: int = 1
    total: int = 1

    def takes(self, units: list[Any]) -> list[Any]:
        """Its slice: neighbouring units, so that machines read different files."""
        return units[len(units) * (self.index - 1) // self.total : len(units) * self.index // self.total]


def prepare(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    directory: Path,
    *,
    part: Part = Part(),
    keep_tokenizer: bool = False,
    report: Report = lambda message: None,
    progress: Progress = lambda done, total: None,
) -> bool:
    """Makes a tokenizer and token shards, or finds that they are there.

    Several processes may call it for the same directory at once: every file is renamed into place whole, and all
    write the same.

    Args:
        config: Which documents.
        tokenizer_config: Which tokenizer.
        directory: Where to (made if missing).
        part: Which slice of the work to do.
        keep_tokenizer: Whether a tokenizer that stands in the directory is the one to use, whatever else is made.
        report: Called with a line about each stage.
        progress: Called as text is tokenized.

    Returns:
        Whether the set is complete: false where other parts are still missing.

    Raises:
        InputError: The text cannot be read or is too small, or the directory was prepared from other text, with other
            settings or with another tokenizer.
    """
    template = _chat_template(config, tokenizer_config, directory, keep_tokenizer) if config.has_chat else None
    settings = settings_of(config, tokenizer_config, template)
    complete = check_begun(settings, tokenizer_config, directory)
    try:
        validation = open_validation(config)
        sources = open_sources(config, without=validation)
    except InputError as error:
        if not complete:
            raise
        raise ChangedSourceError(str(error).rstrip(".")) from error
    if complete:
        check_sources([*sources, *as_source(validation)], directory / "data", config.streaming)
        open_set(directory)
        return True
    _check_outside(directory, config, [*sources, *as_source(validation)])
    _check_not_taken(directory / "data")
    directory.mkdir(parents=True, exist_ok=True)
    kept = made_tokenizer(directory) if keep_tokenizer and (directory / "tokenizer").is_dir() else None
    if kept is not None and template is not None:
        kept.chat_template = template
        kept.save(directory / "tokenizer", config.sequence_length)
    form = None
    if template is not None:
        form = ChatFormat(template, config.sequence_length, config.too_long, config.chat_template)
    job = _Job(config, tokenizer_config, directory, settings, sources, validation, kept, form)
    return _make(job, part, report, progress)


def _check_not_taken(data: Path) -> None:
    """Refuse to write among files that no preparation has written.

    Raises:
        InputError: There are some.
    """
    if data.is_dir() and not any((data / name).exists() for name in ("begun.json", "manifest.json")):
        # What is hidden may be of a preparation that was killed at its first word.
        files = (path for path in data.rglob("*") if path.is_file() and not path.name.startswith("."))
        foreign = next(files, None)
        if foreign is not None:
            raise InputError(f"{foreign}: was not made by a preparation; write elsewhere, or move {data} away.")


def _check_outside(directory: Path, config: DataConfig, sources: list[Source]) -> None:
    """Refuse to write among the text: the next reading would take what is made for text, and who deletes what is made,
    to make it anew, would delete the text.

    Raises:
        InputError: The directory lies in one of the configuration's, or a file of theirs where this command writes.
    """
    made = [(directory / name).resolve() for name in ("data", "tokenizer")]
    for source in sources:
        for file in source.files:
            real = file.path.resolve()
            if (place := next((one for one in made if real.is_relative_to(one)), None)) and real.exists():
                raise InputError(
                    f"{source.option}: {file.path} lies in {place}, which this command makes for itself; write "
                    "elsewhere, or give the text another place."
                )
    options = {config.option(name, "paths"): source.paths for name, source in config.resolved_sources().items()}
    for option, paths in {**options, "data.validation_paths": config.validation_paths}.items():
        for path in paths:
            among = Path(path).expanduser()
            if among.is_dir() and directory.resolve().is_relative_to(among.resolve()):
                raise InputError(
                    f"{option}: {path} holds {directory}, where this command writes, and that would be read as text; "
                    "write outside of it, or give the directories of the text alone."
                )


@dataclass(frozen=True)
class _Job:
    """What is prepared, from what, and where to."""

    config: DataConfig
    tokenizer_config: TokenizerConfig
    directory: Path
    settings: dict[str, Any]
    """What the shards depend on, by option."""
    sources: list[Source]
    validation: Source | None
    """Of `data.validation_paths`."""
    kept: Tokenizer | None
    """The tokenizer that stands in the directory, if it is the one to use whatever else is made."""
    form: ChatFormat | None
    """How conversations are rendered; null where there are none."""


def _make(job: _Job, part: Part, report: Report, progress: Progress) -> bool:
    """Makes what is not there yet of a set; returns whether it is complete then."""
    config, data, validation = job.config, job.directory / "data", job.validation
    _sweep(data)
    # Of paths that matched nothing; what is left out of the files comes with the chunks.
    skipped = sum((source.bad.skipped for source in [*job.sources, *as_source(validation)]), Counter[str]())
    files = {source.name: sizes_of(source) for source in job.sources} if config.streaming else {}
    if config.streaming:
        beginnings: list[Source] = [beginning_of(source, job.tokenizer_config.training_bytes) for source in job.sources]
        job = replace(job, sources=beginnings)
    splits = _choose_splits(job.sources, validation, config)
    workers = config.workers if config.workers is not None else os.cpu_count() or 1
    with ExitStack() as held:
        # Started beside the training of the tokenizer, which keeps one core busy for most of its time.
        if (pool := start_workers(workers)) is not None:
            held.callback(pool.shutdown, cancel_futures=True)
        tokenizer = job.kept or _tokenizer(job, splits, report)
        data.mkdir(parents=True, exist_ok=True)
        write_json(data / "begun.json", {"format": FORMAT, "settings": job.settings})
        encoder = held.enter_context(closing(Encoder(tokenizer, job.directory / "tokenizer", workers, pool)))
        work = all_work(job.sources, validation, splits, config)
        fingerprints = fingerprints_of(work, job.settings)
        make_chunks(part.takes(work), fingerprints, encoder, data, 2 * workers + 1, job.form, progress)
    missing = [unit for source, _, unit in work if not made_chunks(data / source.name, unit)[1]]
    if missing:
        report(f"part {part.index}/{part.total} is done; {len(missing)} of {len(work)} units are still to be made")
        return False
    manifest = {
        "format": FORMAT,
        "settings": job.settings,
        "splits": {name: split.way.name for name, split in splits.items()},
        "split": _in_words(splits, validation),
        "stream_files": files,
        **join(work, fingerprints, tokenizer, data, skipped),
    }
    _check_both_sides(job, Counter(manifest["counts"]), manifest["skipped"])
    write_json(data / "manifest.json", manifest)
    _report(manifest, report)
    return True


def _check_both_sides(job: _Job, counts: Counter[str], skipped: dict[str, int]) -> None:
    """Refuse a set without text to train on, or without any held out; where rows were left out, that is why.

    Raises:
        InputError: It is one.
    """
    if counts["validation_tokens"] and (counts["train_tokens"] or job.config.streaming):
        return
    lacking = "train on" if counts["validation_tokens"] else "hold out"
    read = as_source(job.validation) if lacking == "hold out" and job.validation is not None else job.sources
    if not counts["train_tokens"] + counts["validation_tokens"]:
        shutil.rmtree(job.directory / "data")  # nothing is in it, and it would refuse a mended template
    if skipped and (job.validation is not None or not counts["train_tokens"]):
        first = next((source.bad.first for source in read if source.bad.first is not None), None)
        # Of rows that an earlier start has left out, only the number is known.
        what, remedy = first or (read[0].option, "mend some of these rows")
        raise InputError(f"{what}; no row is left to {lacking} (left out: {said_skipped(skipped)}); {remedy}.")
    if lacking == "train on":
        raise InputError(
            f"{job.sources[0].option}: all of its text is held out; give more text, or data.validation_paths."
        )
    raise InputError(
        f"data.validation_fraction: the {counts['train_bytes']} bytes of text are too few to hold any out; give more "
        "text, or data.validation_paths."
    )


def _sweep(data: Path) -> None:
    """Removes what killed preparations have left half-written; what is still being written has changed within a day."""
    for path in data.rglob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another part has just given it its name
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _choose_splits(sources: Iterable[Source], validation: Source | None, config: DataConfig) -> dict[str, Split]:
    """How each source is split."""
    if validation is not None:
        return {source.name: Split(SplitWay.train_all, config.validation_fraction) for source in sources}
    splits = {}
    for source in sources:
        documents = (document for document, _ in source.read())
        splits[source.name] = choose_split(documents, config.validation_fraction)
        if source.is_chat and splits[source.name].way is SplitWay.tail:
            left_out = f" (left out: {said_skipped(source.bad.skipped)})" if source.bad.skipped else ""
            raise InputError(
                f"{source.option}: holds too few conversations to hold some of them out{left_out}; give more (at "
                f"least {MIN_DOCUMENTS_FOR_HASH_SPLIT}), a larger data.validation_fraction, or data.validation_paths."
            )
    return splits


def _tokenizer(job: _Job, splits: dict[str, Split], report: Report) -> Tokenizer:
    """Takes, trains or (where a preparation was interrupted) finds the tokenizer; its files stand in the directory."""
    path = job.directory / "tokenizer"
    if (job.directory / "data" / "begun.json").exists():
        return made_tokenizer(job.directory)
    if job.tokenizer_config.path is not None:
        tokenizer = load_tokenizer(Path(job.tokenizer_config.path).expanduser())
    else:
        texts = (
            side.text
            for source in job.sources
            for document, _ in source.read()
            if (side := splits[source.name].sides(document)[0])
        )
        first = next(texts, None)
        if first is None:
            raise InputError(f"{job.sources[0].option}: there is no text to train on in it; give files with more text.")
        tokenizer = train_tokenizer(
            itertools.chain([first], texts),
            job.tokenizer_config.vocab_size,
            path,
            job.tokenizer_config.training_bytes,
            job.tokenizer_config.kind,
        )
        is_bpe = job.tokenizer_config.kind is TokenizerKind.bpe
        characters = "" if is_bpe else f", {len(tokenizer.text_ids)} of them characters"
        report(f"trained a tokenizer of {tokenizer.vocab_size} ids{characters}")
    if job.form is not None:
        tokenizer.chat_template = job.form.template
    tokenizer.save(path, job.config.sequence_length)
    return load_tokenizer(path)


def _in_words(splits: dict[str, Split], validation: Source | None) -> str:
    """How validation text was chosen."""
    if validation is not None:
        return str(Split(SplitWay.hold_out_all, 0.5))
    return "; ".join(dict.fromkeys(str(split) for split in splits.values()))


def _report(manifest: dict[str, Any], report: Report) -> None:
    """Says what was made."""
    counts, skipped = Counter(manifest["counts"]), manifest["skipped"]
    if counts["train_assistant_tokens"]:
        report(
            f"tokenized {counts['train_documents']:,} training documents ({counts['train_tokens']:,} tokens, "
            f"{counts['train_assistant_tokens']:,} of them the assistant's)"
        )
    elif counts["train_documents"]:
        report(
            f"tokenized {counts['train_documents']:,} training documents ({counts['train_bytes'] / 1e6:.1f} MB, "
            f"{counts['train_tokens']:,} tokens, {counts['train_bytes'] / counts['train_tokens']:.2f} bytes each)"
        )
    held_out = f"{counts['validation_bytes'] / 1e6:.1f} MB"
    if counts["validation_assistant_tokens"]:
        held_out = f"{counts['validation_assistant_tokens']:,} tokens of the assistant"
    report(f"held out {counts['validation_documents']:,} documents ({held_out}): {manifest['split']}")
    if skipped:
        report("left out: " + said_skipped(skipped))


def said_skipped(skipped: dict[str, int]) -> str:
    """Counts of rows left out, in words."""
    return ", ".join(f"{count:,} × {kind.replace('_', ' ')}" for kind, count in sorted(skipped.items()))


def _chat_template(config: DataConfig, tokenizer_config: TokenizerConfig, directory: Path, keep_tokenizer: bool) -> str:
    """The template of conversations, from the tokenizer that is asked for or, where that is gone, its copy.

    Raises:
        InputError: There is neither, or no template that can be used.
    """
    path = Path(tokenizer_config.path).expanduser() if tokenizer_config.path is not None else None
    is_gone = path is not None and not path.exists() and (directory / "data" / "begun.json").exists()
    if is_gone or (path is None and keep_tokenizer):
        return choose_template(made_tokenizer(directory), config.chat_template)
    if path is None:
        raise InputError(
            "tokenizer.path=null: conversations are too little text to train a tokenizer on, and a model that shall "
            "learn from them has one; give its directory."
        )
    return choose_template(load_tokenizer(path), config.chat_template)
