"""Text to tokenizer and token shards, once; later calls load what is there. The files:

DIRECTORY/tokenizer/            tokenizer.model and transformers' files
DIRECTORY/data/train.*          the training shard
DIRECTORY/data/validation.*     the validation shard
DIRECTORY/data/manifest.json    configuration, fingerprints and counts; written last, so that it means "complete"
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_lm.data.config import DataConfig, TokenizerConfig
from moe_lm.data.corpus import read_documents
from moe_lm.data.shards import TokenShard, write_shard
from moe_lm.data.tokenizer import MODEL_FILE, Tokenizer, train_tokenizer
from moe_lm.data.tokenizer_export import save_tokenizer_files
from moe_lm.errors import InputError
from moe_lm.files import write_json

FORMAT = 1
"""Version of the files; raised when a change makes old ones unreadable."""


@dataclass(frozen=True)
class PreparedData:
    """What training needs of the data."""

    train: TokenShard
    validation: TokenShard
    tokenizer: Tokenizer
    tokenizer_directory: Path
    corpus_fingerprint: str
    counts: dict[str, int]
    """Documents, bytes and tokens of each side (`train_documents` …), and `skipped_files`."""
    split: str
    """How the validation text was chosen, in words."""


def prepare(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    directory: Path,
    *,
    threads: int = 2,
    report: Callable[[str], None] = lambda message: None,
) -> PreparedData:
    """Makes or loads a run's tokenizer and shards.

    Several processes may call it for the same directory at once: every file is renamed into place whole, and all
    write the same. (Calling it on the main process first, and on the others after, saves the work.)

    Args:
        config: Which documents.
        tokenizer_config: Which tokenizer.
        directory: The run's directory (made if missing).
        threads: Threads to tokenize with.
        report: Called with a line about each stage.

    Raises:
        InputError: The text cannot be read or is too small, or the directory was prepared with other settings.
    """
    manifest_path = directory / "data" / "manifest.json"
    settings = _settings(config, tokenizer_config)
    if manifest_path.exists():
        _check_settings(settings, manifest_path)
    else:
        _make(config, tokenizer_config, directory, settings, threads, report)
    prepared = _load(directory, manifest_path)
    if prepared.train.num_tokens < config.sequence_length + 1:
        raise InputError(
            f"data.sequence_length={config.sequence_length}: the training text has only {prepared.train.num_tokens} "
            f"tokens ({prepared.train.num_bytes} bytes), which do not fill one row; "
            f"give more text, or a sequence length of at most {prepared.train.num_tokens - 1}."
        )
    return prepared


def _make(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    directory: Path,
    settings: dict[str, Any],
    threads: int,
    report: Callable[[str], None],
) -> None:
    corpus = read_documents(config)
    num_bytes = sum(len(document.text.encode()) for document in corpus.train)
    report(
        f"read {len(corpus.train)} training documents ({num_bytes / 1e6:.1f} MB) and {len(corpus.validation)} "
        f"for validation ({corpus.split})"
    )
    if tokenizer_config.path is not None:
        tokenizer = Tokenizer(Path(tokenizer_config.path).expanduser())
    else:
        texts = [document.text for document in corpus.train]
        tokenizer = train_tokenizer(
            texts, tokenizer_config.vocab_size, directory / "tokenizer", tokenizer_config.training_bytes
        )
        report(f"trained a tokenizer of {tokenizer.vocab_size} ids")
    save_tokenizer_files(tokenizer, directory / "tokenizer", config.sequence_length)
    shards = {
        side: write_shard(documents, tokenizer, directory / "data", side, threads)
        for side, documents in (("train", corpus.train), ("validation", corpus.validation))
    }
    train = shards["train"]
    report(f"wrote {train.num_tokens} training tokens ({train.num_bytes / train.num_tokens:.2f} bytes each)")
    counts = {
        f"{side}_{unit}": getattr(shard, f"num_{unit}")
        for side, shard in shards.items()
        for unit in ("documents", "bytes", "tokens")
    }
    write_json(
        directory / "data" / "manifest.json",
        {
            "format": FORMAT,
            "settings": settings,
            "corpus_fingerprint": corpus.fingerprint,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "split": corpus.split,
            "counts": {**counts, "skipped_files": corpus.num_skipped},
        },
    )


def _load(directory: Path, manifest_path: Path) -> PreparedData:
    manifest = json.loads(manifest_path.read_text())
    tokenizer = Tokenizer(directory / "tokenizer" / MODEL_FILE)
    if tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        raise InputError(
            f"{directory / 'tokenizer' / MODEL_FILE}: is not the tokenizer that the token shards in "
            f"{manifest_path.parent} were made with; delete both directories and run the command again."
        )
    shards = [TokenShard(directory / "data", side) for side in ("train", "validation")]
    for shard in shards:
        shard.verify()
    return PreparedData(
        train=shards[0],
        validation=shards[1],
        tokenizer=tokenizer,
        tokenizer_directory=directory / "tokenizer",
        corpus_fingerprint=manifest["corpus_fingerprint"],
        counts=manifest["counts"],
        split=manifest["split"],
    )


def _settings(config: DataConfig, tokenizer_config: TokenizerConfig) -> dict[str, Any]:
    """What the shards depend on: not the sequence length, nor masking."""
    data = {**asdict(config), "source": config.source.name}
    del data["sequence_length"], data["mask_documents"]
    return {f"data.{name}": value for name, value in data.items()} | {
        f"tokenizer.{name}": value for name, value in asdict(tokenizer_config).items()
    }


def _check_settings(settings: dict[str, Any], manifest_path: Path) -> None:
    """Compares with the settings a directory was prepared with, and names what differs."""
    try:
        manifest = json.loads(manifest_path.read_text())
        written = manifest["settings"] if manifest["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{manifest_path}: cannot be read ({error}); delete its directory to prepare again.") from None
    differences = [
        f"{name}={settings.get(name)!r} (there: {written.get(name)!r})"
        for name in sorted(settings.keys() | written.keys())
        if settings.get(name) != written.get(name)
    ]
    if differences:
        raise InputError(
            f"{', '.join(differences)}: {manifest_path.parent} was prepared with other settings; "
            "choose another run_name, or delete that directory to prepare again."
        )
