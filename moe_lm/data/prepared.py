"""Prepared sets: opening what `prepare.py` made, one of them or several together."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lm.data.chunks import SIDES, Chunk
from moe_lm.data.config import DataConfig, DataSource, TokenizerConfig
from moe_lm.data.documents import Split, SplitWay
from moe_lm.data.shards import TokenShard
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.errors import InputError
from moe_lm.files import sha256
from moe_lm.plain import to_plain

FORMAT = 2
"""Version of the files; raised when a change makes old ones unreadable."""

VALIDATION = "validation.paths"
"""Stands for a source's name, which can not have a dot, for `data.validation_paths`."""


CHOSEN_BEFORE = (
    *("text_field", "domain", "domain_field", "domains", "subset", "split", "revision"),
    *("on_bad_row", "too_long"),
)
"""Fields that chose the text of a set, and say nothing when it is trained on. Not `validation_fraction`, which an
experiment may bring along."""


@dataclass(frozen=True)
class PreparedData:
    """What training needs of the data."""

    train: dict[str, list[TokenShard]]
    """Training shards of each source; empty lists for streams."""
    validation: list[TokenShard]
    tokenizer: Tokenizer
    tokenizer_directory: Path
    corpus_fingerprint: str
    counts: dict[str, int]
    """Documents, bytes and tokens of each side (`train_documents` …)."""
    split: str
    """How the validation text was chosen, in words."""
    domains: list[str]
    """Names of all domains; their places are the domain ids of batches."""
    splits: dict[str, Split] = field(default_factory=dict)
    """How each stream is split."""


def load(
    config: DataConfig, tokenizer_config: TokenizerConfig, directory: Path, *, keep_tokenizer: bool = False
) -> PreparedData:
    """Opens what `prepare` made; for `data.source=prepared`, in the directories that `data.paths` names.

    Args:
        config: Which documents, and which of them are streamed.
        tokenizer_config: Which tokenizer is asked for.
        directory: A run's directory; a prepared set's tokenizer is copied into it.
        keep_tokenizer: Whether one that stands there must be the same, and stays.

    Raises:
        InputError: A file is missing or not what was written, sets have different tokenizers, an option would choose
            other text than theirs, or there is too little text for one row.
    """
    is_prepared = config.source is DataSource.prepared
    opened = [open_set(Path(path).expanduser()) for path in (config.paths if is_prepared else [str(directory)])]
    first = opened[0]
    for path, other in zip(config.paths, opened):
        if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise InputError(
                f"data.paths: {path} was prepared with another tokenizer than {config.paths[0]}; prepare one of them "
                "anew with the other's, by tokenizer.path."
            )
        if both := other.train.keys() & {name for one in opened if one is not other for name in one.train}:
            raise InputError(
                f"data.paths: {path} and another set both have a source named {min(both)!r}; prepare one of them under "
                "another name, by data.sources.NAME."
            )
    if is_prepared:
        if not keep_tokenizer:  # one that goes on keeps the options that it was started with
            _check_chosen(config)
        if tokenizer_config.path is not None:
            asked = load_tokenizer(Path(tokenizer_config.path).expanduser())
            if asked.fingerprint != first.tokenizer.fingerprint:
                raise InputError(
                    f"data.paths: {config.paths[0]} was prepared with another tokenizer than that in "
                    f"{tokenizer_config.path}; prepare the text anew with tokenizer.path="
                    f"{tokenizer_config.path}, or, if you gave it here, leave it out."
                )
        for name in config.sources:
            if not any(name in one.train for one in opened):
                there = ", ".join(sorted(name for one in opened for name in one.train))
                raise InputError(f"data.sources.{name}: there is no such source in data.paths; there are {there}.")
        if keep_tokenizer and (directory / "tokenizer").is_dir():
            if load_tokenizer(directory / "tokenizer").fingerprint != first.tokenizer.fingerprint:
                raise InputError(
                    f"data.paths: {config.paths[0]} was prepared with another tokenizer than the run in {directory} "
                    "has; give the set that it was started with, or another run_name= to start anew."
                )
        else:
            first.tokenizer.save(directory / "tokenizer", config.sequence_length)
    return _join(opened, config, directory)


def _check_chosen(config: DataConfig) -> None:
    """Refuse what chooses text, unless all of the sets were prepared with the same.

    Raises:
        InputError: It is there.
    """
    manifests = [read_manifest(Path(path).expanduser() / "data" / "manifest.json") for path in config.paths]
    given, usual = to_plain(config), to_plain(DataConfig())
    for name in CHOSEN_BEFORE:
        if given[name] == usual[name]:
            continue
        if any(manifest["settings"].get(f"data.{name}", usual[name]) != given[name] for manifest in manifests):
            raise InputError(
                f"data.{name}={given[name]}: the text of a prepared set was chosen when it was prepared; leave it out, "
                "or prepare the text anew with it."
            )


def made_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that stands beside prepared data.

    Raises:
        InputError: It is missing, or can not be read.
    """
    if not (directory / "tokenizer").is_dir():
        raise InputError(
            f"{directory / 'tokenizer'}: is missing, and {directory / 'data'} was made with it; bring it back, or "
            "remove the data as well, to make both again."
        )
    return load_tokenizer(directory / "tokenizer")


def _join(opened: list[PreparedData], config: DataConfig, directory: Path) -> PreparedData:
    """Several sets as one."""
    train = {name: shards for one in opened for name, shards in sorted(one.train.items())}
    validation = [shard for one in opened for shard in one.validation]
    counts: Counter[str] = Counter()
    for one in opened:
        counts.update(one.counts)
    for name, shards in train.items():
        tokens = sum(shard.num_tokens for shard in shards)
        if not config.streaming and tokens < config.sequence_length + 1:
            raise InputError(
                f"data.sequence_length={config.sequence_length}: the training text of {name} has only {tokens} tokens, "
                f"which do not fill one row; give more text, or a sequence length of at most {max(2, tokens - 1)}."
            )
    longest = max(
        (s.longest_document for side in (*train.values(), validation) for s in side if s.spans is not None), default=0
    )
    if longest > config.sequence_length + 1:
        raise InputError(
            f"data.sequence_length={config.sequence_length}: there is a conversation of {longest} tokens in the "
            f"prepared set, and conversations are not cut in two; give at least {longest - 1}, or prepare it anew."
        )
    names = {name for shards in (*train.values(), validation) for s in shards for name in s.domain_names}
    if config.streaming:
        names |= {*config.domains, *(s.domain for s in config.resolved_sources().values() if s.domain is not None)}
    fingerprints = [one.corpus_fingerprint for one in opened]
    joined = hashlib.sha256("".join(fingerprints).encode()).hexdigest() if len(opened) > 1 else fingerprints[0]
    return PreparedData(
        train=train,
        validation=validation,
        tokenizer=opened[0].tokenizer,
        tokenizer_directory=directory / "tokenizer",
        corpus_fingerprint=joined,
        counts=dict(counts),
        split="; ".join(dict.fromkeys(one.split for one in opened)),
        domains=sorted(names),
        splits={name: split for one in opened for name, split in one.splits.items()},
    )


def open_set(directory: Path) -> PreparedData:
    """Opens one prepared set: its index is verified now, its tokens as they are read.

    Raises:
        InputError: A file is missing or not what was written.
    """
    data = directory / "data"
    manifest = read_manifest(data / "manifest.json")
    tokenizer = made_tokenizer(directory)
    if tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        raise InputError(
            f"{directory / 'tokenizer'}: is not the tokenizer that the token shards in {data} were made with; bring "
            "that one back, or delete both directories and run the command again."
        )
    sides: dict[str, dict[str, list[TokenShard]]] = {side: {} for side in SIDES}
    for source, chunks in manifest["chunks"].items():
        for name, expected in chunks:
            path = data / source / f"{name}.json"
            if not path.exists() or sha256(path) != expected:
                raise InputError(
                    f"{path}: is not what was written; bring back a good copy, or delete {data} to prepare it again."
                )
            chunk = Chunk.load(path)
            for side in SIDES:
                shards = sides[side].setdefault(source, [])
                if chunk.shards[side].num_tokens:
                    shards.append(chunk.open_shard(data / source, name, side))
    fraction = float(manifest["settings"]["data.validation_fraction"])
    return PreparedData(
        train={name: shards for name, shards in sides["train"].items() if name != VALIDATION},
        validation=[shard for shards in sides["validation"].values() for shard in shards],
        tokenizer=tokenizer,
        tokenizer_directory=directory / "tokenizer",
        corpus_fingerprint=manifest["corpus_fingerprint"],
        counts=manifest["counts"],
        split=manifest["split"],
        domains=[],
        splits={name: Split(SplitWay[way], fraction) for name, way in manifest["splits"].items()},
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads manifest.json or begun.json.

    Raises:
        InputError: It is not there, or not what this version writes.
    """
    if not path.exists():
        if not path.parent.parent.exists():
            raise InputError(f"data.paths: '{path.parent.parent}' does not exist (looked from {Path.cwd()}).")
        state = "is begun but not complete; run `moe-lm prepare` for it again" if path.parent.is_dir() else "holds none"
        raise InputError(f"data.paths: {path.parent.parent} is no prepared set: it {state}.")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']} instead of {FORMAT}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete its directory to prepare again.") from None
