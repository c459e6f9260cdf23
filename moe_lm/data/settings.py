"""What a prepared set depends on besides its text, and whether what stands in a directory was made from the same."""

import hashlib
from pathlib import Path
from typing import Any

from moe_lm.data.chunks import ChangedSourceError, Chunk, Unit, check_unchanged
from moe_lm.data.config import DataConfig, TokenizerConfig, TokenizerKind
from moe_lm.data.prepared import made_tokenizer, read_manifest
from moe_lm.data.sources import Source
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.errors import InputError
from moe_lm.plain import flatten, to_plain

DATA_ONLY_CUT = (
    "sequence_length",
    "mask_documents",
    "packing",
    "route_prompts",
    "epochs",
    "num_streams",
    "workers",
)
"""Fields that say how rows are cut, ordered and read, not what is in the shards."""


def settings_of(config: DataConfig, tokenizer_config: TokenizerConfig, template: str | None) -> dict[str, Any]:
    """What the shards depend on, by option."""
    values = to_plain(config)
    for name in DATA_ONLY_CUT if template is None else set(DATA_ONLY_CUT) - {"sequence_length"}:
        del values[name]
    if not values["domains"]:
        del values["domains"]  # any may come
    if template is None:
        del values["chat_template"], values["too_long"]
    else:
        # Its text counts, wherever it comes from.
        values["chat_template"] = f"SHA-256 {hashlib.sha256(template.encode()).hexdigest()[:16]}"
    for source in values["sources"].values():
        del source["weight"], source["final_weight"]
    for place in (values, *values["sources"].values()):
        if place["revision"] is None:
            del place["revision"]  # as in sets that were made when there was none: their chunks' fingerprints hold
    tokenizer = to_plain(tokenizer_config)
    if tokenizer_config.kind is TokenizerKind.bpe:
        del tokenizer["kind"]  # as in sets that were made when there was no other: their chunks' fingerprints hold
    return dict(sorted(flatten({"data": values, "tokenizer": tokenizer}).items()))


def check_begun(settings: dict[str, Any], tokenizer_config: TokenizerConfig, directory: Path) -> bool:
    """Compares settings and tokenizer with those that a directory was prepared with, or is being prepared with.

    Returns:
        Whether it is complete.

    Raises:
        InputError: They differ.
    """
    data = directory / "data"
    begun, manifest = data / "begun.json", data / "manifest.json"
    if manifest.exists():
        _check_settings(settings, manifest)
    elif begun.exists():
        if not any(data.glob("*/*.json")) and read_manifest(begun)["settings"] != settings:
            begun.unlink()  # nothing was made with the others: their first rows were refused
        else:
            _check_settings(settings, begun)
    if begun.exists():
        _check_tokenizer(tokenizer_config, directory)
    return manifest.exists()


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """Compares with the settings a directory was prepared with, and names what differs."""
    left_out = {"tokenizer.kind": TokenizerKind.bpe.name}
    settings, written = left_out | settings, left_out | read_manifest(path)["settings"]
    if settings["tokenizer.path"] is not None and written["tokenizer.path"] is not None:
        settings = settings | {"tokenizer.path": written["tokenizer.path"]}  # what lies there is compared by itself
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


def check_sources(sources: list[Source], data: Path, streaming: bool) -> None:
    """Compares the files of sources with those that a complete set was prepared from, and of streams their sizes.

    Raises:
        ChangedSourceError: A file has come, gone or changed.
    """
    sizes = read_manifest(data / "manifest.json")["stream_files"]
    for source in sources:
        if streaming and source.name in sizes and sizes_of(source) != sizes[source.name]:
            raise ChangedSourceError(f"{source.option}: its files are not those that {data.parent} began to stream")
        recorded = []
        for path in sorted((data / source.name).glob("*-000.json")):
            recorded += Chunk.load(path).files
        check_unchanged(source, Unit(0, 0, len(source.files)), recorded, data)


def sizes_of(source: Source) -> list[list[Any]]:
    """Names and sizes of the files of a stream, which is not read to its end to be known."""
    return [[path.name, path.stat().st_size] for path in source.watched]
