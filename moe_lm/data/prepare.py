"""Text to tokenizer and token shards, once; later calls load what is there. The files:

DIRECTORY/tokenizer/              tokenizer.model (or tokenizer.json) and transformers' files
DIRECTORY/data/SOURCE/            the chunks of each source (`chunks.py`); of a stream, of its held-out text only
DIRECTORY/data/validation.paths/  the chunks of data.validation_paths
DIRECTORY/data/begun.json         the settings, written first, so that an interrupted preparation goes on as the same
DIRECTORY/data/manifest.json      settings, fingerprints, counts, the chunks' hashes; last, as the mark of completion

Whatever is made is a function of text and settings alone: interrupted or not, by one process or many, on one machine
or, each taking a part of the units, on several that join their chunks in one directory.
"""

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_lm.data.chat_template import ChatFormat, choose_template
from moe_lm.data.chunks import (
    SIDES,
    ChangedSourceError,
    Chunk,
    Unit,
    check_made,
    check_unchanged,
    chunk_name,
    divide,
    made_chunks,
    make_unit,
)
from moe_lm.data.config import DataConfig, TokenizerConfig
from moe_lm.data.documents import MIN_DOCUMENTS_FOR_HASH_SPLIT, Split, SplitWay, choose_split
from moe_lm.data.encode import Encoder, start_workers
from moe_lm.data.prepared import FORMAT, VALIDATION, made_tokenizer, open_set, read_manifest
from moe_lm.data.sources import Beginning, Source, beginning_of, open_sources, open_validation
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moe_lm.errors import InputError
from moe_lm.files import sha256, write_json

DATA_ONLY_CUT = (
    "sequence_length",
    "mask_documents",
    "packing",
    "route_prompts",
    "epochs",
    "num_streams",
    "workers",
    "domains",
)
"""Fields that say how rows are cut, ordered and read, not what is in the shards."""

STALE_SECONDS = 3600
"""Age at which a temporary file belongs to nobody any more."""

Report = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called with bytes of text tokenized so far, and bytes of all files (0 where they are not known)."""


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
    data = directory / "data"
    template = _chat_template(config, tokenizer_config, directory, keep_tokenizer) if config.has_chat else None
    settings = _settings(config, tokenizer_config, template)
    for name in ("manifest.json", "begun.json"):
        if (data / name).exists():
            if (
                name == "begun.json"
                and not any(data.glob("*/*.json"))
                and read_manifest(data / name)["settings"] != settings
            ):
                (data / name).unlink()  # nothing was made with the others: their first rows were refused
            else:
                _check_settings(settings, data / name)
            break
    complete = (data / "manifest.json").exists()
    if (data / "begun.json").exists():
        _check_tokenizer(tokenizer_config, directory)
    try:
        validation = open_validation(config)
        sources = open_sources(config, without=validation)
    except InputError as error:
        if not complete:
            raise
        raise ChangedSourceError(str(error).rstrip(".")) from error
    if complete:
        _check_sources([*sources, *_as_source(validation)], data, config.streaming)
        open_set(directory)
        return True
    directory.mkdir(parents=True, exist_ok=True)
    kept = made_tokenizer(directory) if keep_tokenizer and (directory / "tokenizer").is_dir() else None
    if kept is not None and template is not None:
        kept.chat_template = template
        kept.save(directory / "tokenizer", config.sequence_length)
    form = ChatFormat(template, config.sequence_length, config.too_long) if template is not None else None
    return _make(config, tokenizer_config, directory, sources, validation, settings, part, kept, form, report, progress)


def _make(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    directory: Path,
    sources: list[Source],
    validation: Source | None,
    settings: dict[str, Any],
    part: Part,
    kept: Tokenizer | None,
    form: ChatFormat | None,
    report: Report,
    progress: Progress,
) -> bool:
    """Makes what is not there yet of a set; returns whether it is complete then."""
    data = directory / "data"
    _sweep(data)
    # Of paths that matched nothing; what is left out of the files comes with the chunks.
    skipped = sum((source.bad.skipped for source in [*sources, *_as_source(validation)]), Counter[str]())
    files = {source.name: _sizes(source) for source in sources} if config.streaming else {}
    if config.streaming:
        sources = [beginning_of(source, tokenizer_config.training_bytes) for source in sources]
    splits = _choose_splits(sources, validation, config)
    workers = config.workers if config.workers is not None else os.cpu_count() or 1
    with ExitStack() as held:
        # Started beside the training of the tokenizer, which keeps one core busy for most of its time.
        if (pool := start_workers(workers)) is not None:
            held.callback(pool.shutdown, cancel_futures=True)
        tokenizer = kept or _tokenizer(
            sources, splits, tokenizer_config, directory, config.sequence_length, form, report
        )
        data.mkdir(parents=True, exist_ok=True)
        write_json(data / "begun.json", {"format": FORMAT, "settings": settings})
        encoder = held.enter_context(closing(Encoder(tokenizer, directory / "tokenizer", workers, pool)))
        work = _work(sources, validation, splits, config)
        fingerprints = {
            source.name: hashlib.sha256(json.dumps([settings, repr(split)]).encode()).hexdigest()
            for source, split, _ in work
        }
        _make_chunks(part.takes(work), fingerprints, encoder, data, 2 * workers + 1, form, progress)
    missing = [unit for source, _, unit in work if not made_chunks(data / source.name, unit)[1]]
    if missing:
        report(f"part {part.index}/{part.total} is done; {len(missing)} of {len(work)} units are still to be made")
        return False
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "splits": {name: split.way.name for name, split in splits.items()},
        "split": _in_words(splits, validation),
        "stream_files": files,
        **_join(work, fingerprints, tokenizer, data, skipped),
    }
    if not config.streaming and not manifest["counts"]["train_tokens"]:
        raise InputError(f"{sources[0].option}: all of its text is held out; give more text, or data.validation_paths.")
    write_json(data / "manifest.json", manifest)
    _report(manifest, report)
    return True


Work = tuple[Source, Split, Unit]


def _sweep(data: Path) -> None:
    """Removes what killed preparations have left half-written; what is still being written has changed just now."""
    for path in data.rglob(".*.tmp"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


def _as_source(validation: Source | None) -> list[Source]:
    """`data.validation_paths` as a source under the name of its directory."""
    return [replace(validation, name=VALIDATION)] if validation is not None else []


def _work(sources: list[Source], validation: Source | None, splits: dict[str, Split], config: DataConfig) -> list[Work]:
    """All units, in the order in which one process would make them."""
    work: list[Work] = []
    hold_out_all = Split(SplitWay.hold_out_all, config.validation_fraction)
    for source in sources:
        split = splits[source.name]
        if isinstance(source, Beginning):
            # Of a stream, the held-out documents of its beginning; none of its documents is held as shards to train on.
            held_out = [side for document in source.documents if (side := split.sides(document)[1])]
            source, split = replace(source, documents=held_out), hold_out_all
        work += [(source, split, unit) for unit in divide(source)]
    for source in _as_source(validation):
        work += [(source, hold_out_all, unit) for unit in divide(source)]
    return work


def _make_chunks(
    work: list[Work],
    fingerprints: dict[str, str],
    encoder: Encoder,
    data: Path,
    window: int,
    form: ChatFormat | None,
    progress: Progress,
) -> None:
    """Makes the units that are not there yet."""
    total, done = sum(f.size for source, _, unit in work for f in source.files[unit.first : unit.stop]), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    for source, split, unit in work:
        settings = fingerprints[source.name]
        make_unit(
            source,
            split,
            unit,
            data / source.name,
            encoder,
            settings_fingerprint=settings,
            window=window,
            form=form if source.is_chat else None,
            progress=advance,
        )


def _check_tokenizer(tokenizer_config: TokenizerConfig, directory: Path) -> None:
    """Compares the tokenizer that is asked for with the one a set was begun with.

    Raises:
        InputError: It is another one.
    """
    path = Path(tokenizer_config.path).expanduser() if tokenizer_config.path is not None else None
    if path is not None and path.exists() and load_tokenizer(path).fingerprint != made_tokenizer(directory).fingerprint:
        raise InputError(
            f"tokenizer.path={tokenizer_config.path}: is another tokenizer than {directory} was begun with; prepare "
            "into another directory, or delete that one to prepare it anew."
        )


def _choose_splits(sources: Iterable[Source], validation: Source | None, config: DataConfig) -> dict[str, Split]:
    """How each source is split."""
    if validation is not None:
        return {source.name: Split(SplitWay.train_all, config.validation_fraction) for source in sources}
    splits = {}
    for source in sources:
        documents = (document for document, _ in source.read())
        splits[source.name] = choose_split(documents, config.validation_fraction)
        if source.is_chat and splits[source.name].way is SplitWay.tail:
            raise InputError(
                f"{source.option}: holds too few conversations to hold some of them out; give at least "
                f"{MIN_DOCUMENTS_FOR_HASH_SPLIT}, or data.validation_paths."
            )
    return splits


def _tokenizer(
    sources: list[Source],
    splits: dict[str, Split],
    tokenizer_config: TokenizerConfig,
    directory: Path,
    sequence_length: int,
    form: ChatFormat | None,
    report: Report,
) -> Tokenizer:
    """Takes, trains or (where a preparation was interrupted) finds the tokenizer; its files stand in the directory."""
    path = directory / "tokenizer"
    if (directory / "data" / "begun.json").exists():
        return made_tokenizer(directory)
    if tokenizer_config.path is not None:
        tokenizer = load_tokenizer(Path(tokenizer_config.path).expanduser())
    else:
        texts = (
            side.text
            for source in sources
            for document, _ in source.read()
            if (side := splits[source.name].sides(document)[0])
        )
        first = next(texts, None)
        if first is None:
            raise InputError(f"{sources[0].option}: there is no text in it; give files with text.")
        tokenizer = train_tokenizer(
            itertools.chain([first], texts), tokenizer_config.vocab_size, path, tokenizer_config.training_bytes
        )
        report(f"trained a tokenizer of {tokenizer.vocab_size} ids")
    if form is not None:
        tokenizer.chat_template = form.template
    tokenizer.save(path, sequence_length)
    return load_tokenizer(path)


def _join(
    work: list[Work], fingerprints: dict[str, str], tokenizer: Tokenizer, data: Path, skipped: Counter[str]
) -> dict[str, Any]:
    """What the chunks say together, for the manifest, whoever made them."""
    chunks: dict[str, list[list[str]]] = {}
    digest = hashlib.sha256()
    counts = Counter({f"{side}_{what}": 0 for side in SIDES for what in ("documents", "bytes", "tokens")})
    for source, _, unit in work:
        made = made_chunks(data / source.name, unit)[0]
        check_made(source, unit, made, tokenizer.fingerprint, fingerprints[source.name], data / source.name)
        for number, chunk in enumerate(made):
            path = data / source.name / f"{chunk_name(unit, number)}.json"
            chunks.setdefault(source.name, []).append([path.stem, sha256(path)])
            digest.update(chunk.documents_sha256.encode())
            skipped.update(chunk.skipped)
            for side, shard in chunk.shards.items():
                for what in ("documents", "bytes", "tokens"):
                    counts[f"{side}_{what}"] += getattr(shard, f"num_{what}")
                if shard.num_targets is not None:
                    counts[f"{side}_assistant_tokens"] += shard.num_targets
    if not counts["validation_tokens"]:
        raise InputError(
            f"data.validation_fraction: the {counts['train_bytes']} bytes of text are too few to hold any out; "
            "give more text, or data.validation_paths."
        )
    return {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "corpus_fingerprint": digest.hexdigest(),
        "counts": dict(counts),
        "skipped": dict(sorted(skipped.items())),
        "chunks": chunks,
    }


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


def _check_sources(sources: list[Source], data: Path, streaming: bool) -> None:
    """Compares the files of sources with those that a complete set was prepared from, and of streams their sizes.

    Raises:
        ChangedSourceError: A file has come, gone or changed.
    """
    sizes = read_manifest(data / "manifest.json")["stream_files"]
    for source in sources:
        if streaming and source.name in sizes and _sizes(source) != sizes[source.name]:
            raise ChangedSourceError(f"{source.option}: its files are not those that {data.parent} began to stream")
        recorded = []
        for path in sorted((data / source.name).glob("*-000.json")):
            recorded += Chunk.load(path).files
        check_unchanged(source, Unit(0, 0, len(source.files)), recorded, data)


def _sizes(source: Source) -> list[list[Any]]:
    """Names and sizes of the files of a stream, which is not read to its end to be known."""
    return [[path.name, path.stat().st_size] for path in source.watched]


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


def _settings(config: DataConfig, tokenizer_config: TokenizerConfig, template: str | None) -> dict[str, Any]:
    """What the shards depend on, by option."""
    values = asdict(config)
    for name in DATA_ONLY_CUT if template is None else set(DATA_ONLY_CUT) - {"sequence_length"}:
        del values[name]
    if template is None:
        del values["chat_template"], values["too_long"]
    else:
        # Its text counts, wherever it comes from.
        values["chat_template"] = f"SHA-256 {hashlib.sha256(template.encode()).hexdigest()[:16]}"
    for source in values["sources"].values():
        del source["weight"], source["final_weight"]
    flat = _flatten({"data": values, "tokenizer": asdict(tokenizer_config)})
    return {name: value.name if hasattr(value, "name") else value for name, value in sorted(flat.items())}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """Compares with the settings a directory was prepared with, and names what differs."""
    written = read_manifest(path)["settings"]
    differences = [
        f"{name}={settings.get(name)!r} (there: {written.get(name)!r})"
        for name in sorted(settings.keys() | written.keys())
        if settings.get(name) != written.get(name)
    ]
    if differences:
        raise InputError(
            f"{', '.join(differences)}: {path.parent} was prepared with other settings; "
            "prepare into another directory, or delete that one to prepare it anew."
        )
