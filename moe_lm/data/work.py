"""The units of all sources of a set: what has to be made, making it, and joining what was made, by whomever."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lm.data.chat_template import ChatFormat
from moe_lm.data.chunks import SIDES, Unit, check_made, chunk_name, divide, made_chunks, make_unit
from moe_lm.data.config import DataConfig
from moe_lm.data.documents import Split, SplitWay
from moe_lm.data.encode import Encoder
from moe_lm.data.prepared import VALIDATION
from moe_lm.data.sources import Beginning, Source
from moe_lm.data.tokenizer import Tokenizer
from moe_lm.files import sha256

Progress = Callable[[int, int], None]
"""Called with bytes of text tokenized so far, and bytes of all files (0 where they are not known)."""

Work = tuple[Source, Split, Unit]


def as_source(validation: Source | None) -> list[Source]:
    """`data.validation_paths` as a source under the name of its directory."""
    return [replace(validation, name=VALIDATION)] if validation is not None else []


def all_work(
    sources: list[Source], validation: Source | None, splits: dict[str, Split], config: DataConfig
) -> list[Work]:
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
    for source in as_source(validation):
        work += [(source, hold_out_all, unit) for unit in divide(source)]
    return work


def fingerprints_of(work: list[Work], settings: dict[str, Any]) -> dict[str, str]:
    """By source, a hash of the settings and of the way it is split."""
    return {
        source.name: hashlib.sha256(json.dumps([settings, repr(split)]).encode()).hexdigest()
        for source, split, _ in work
    }


def make_chunks(
    work: list[Work],
    fingerprints: dict[str, str],
    encoder: Encoder,
    data: Path,
    window: int,
    form: ChatFormat | None,
    progress: Progress,
) -> None:
    """Makes the units that are not there yet.

    Args:
        work: The units.
        fingerprints: By source, what its chunks depend on besides text and tokenizer.
        encoder: Tokenizes.
        data: Holds a directory of chunks for each source.
        window: Batches of text that may be on their way at a time.
        form: How conversations are rendered; null where there are none.
        progress: Called as text is tokenized.

    Raises:
        InputError: A file can not be read, holds a bad row, or has changed since its unit was begun.
    """
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


def join(
    work: list[Work], fingerprints: dict[str, str], tokenizer: Tokenizer, data: Path, skipped: Counter[str]
) -> dict[str, Any]:
    """What the chunks say together, for the manifest, whoever made them.

    Args:
        work: All units of the set, each complete.
        fingerprints: By source, what its chunks depend on besides text and tokenizer.
        tokenizer: The set's.
        data: Holds a directory of chunks for each source.
        skipped: Rows left out that no chunk counts, by kind; those of the chunks are added.

    Raises:
        InputError: A chunk was made otherwise than the set.
    """
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
    return {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "corpus_fingerprint": digest.hexdigest(),
        "counts": dict(counts),
        "skipped": dict(sorted(skipped.items())),
        "chunks": chunks,
    }
