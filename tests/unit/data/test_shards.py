"""Catches: shards that do not hold the documents, half-written or damaged ones that are read, settings that drift."""

import json
import multiprocessing
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from moe_lm.data.corpus import Document

from moe_lm.data.config import DataConfig, DataSource, TokenizerConfig
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import TokenShard, write_shard
from moe_lm.errors import InputError
from moe_lm.files import atomic_file

MakeShard = Callable[[Sequence[str]], TokenShard]


@pytest.fixture
def settings(tmp_path: Path, sample_texts: list[str]) -> tuple[DataConfig, TokenizerConfig]:
    """Four text files of Python source and a small vocabulary."""
    (tmp_path / "text").mkdir()
    for index, text in enumerate(sample_texts):
        (tmp_path / "text" / f"{index}.py").write_text(text, encoding="utf-8", newline="")
    data = DataConfig(source=DataSource.text, paths=[str(tmp_path / "text")])
    return data, TokenizerConfig(vocab_size=700)


def test_shard_holds_each_document_between_marks(make_shard: MakeShard, random_texts: list[str]) -> None:
    shard = make_shard(random_texts)
    ends = [*shard.starts[1:], shard.num_tokens]
    for text, start, end in zip(random_texts, shard.starts, ends, strict=True):
        ids = shard.tokens[start:end].tolist()
        assert ids[0] == 1
        assert ids[-1] == 2
        assert bytes(token - 4 for token in ids[1:-1]).decode() == text
    assert shard.num_bytes == sum(len(text.encode()) for text in random_texts)
    assert shard.num_targets == shard.num_bytes + len(random_texts)
    assert shard.tokens.dtype == np.uint16
    assert isinstance(shard.tokens, np.memmap)
    shard.verify()


def test_no_temporary_files_stay(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard(["a"])
    assert len(list(shard.directory.iterdir())) == 3
    with pytest.raises(TypeError), atomic_file(tmp_path / "file") as file:
        file.write("not bytes")  # type: ignore[call-overload]
    assert not (tmp_path / "file").exists()
    assert not list(tmp_path.glob(".file*"))


def test_damaged_shards_are_refused(make_shard: MakeShard) -> None:
    shard = make_shard(["some text", "more text"])
    tokens = shard.directory / f"{shard.name}.tokens.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    with pytest.raises(InputError, match="has 21 tokens in 2 documents, but should have 22"):
        TokenShard(shard.directory, shard.name)
    tokens.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    with pytest.raises(InputError, match=r"tokens.bin: the content is not what was written"):
        TokenShard(shard.directory, shard.name).verify()
    tokens.unlink()
    with pytest.raises(InputError, match="this token shard cannot be read"):
        TokenShard(shard.directory, shard.name)


def test_prepare_makes_once_and_then_loads(settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path) -> None:
    data, tokenizer = settings
    reports: list[str] = []
    first = prepare(data, tokenizer, tmp_path / "run", report=reports.append)
    assert len(reports) == 3
    assert "4 training documents" in reports[0]
    assert "700 ids" in reports[1]
    for path in (tmp_path / "text").iterdir():
        path.unlink()
    again = prepare(data, tokenizer, tmp_path / "run", report=reports.append)
    assert len(reports) == 3
    assert np.array_equal(first.train.tokens, again.train.tokens)
    assert (first.corpus_fingerprint, first.counts, first.split) == (
        again.corpus_fingerprint,
        again.counts,
        again.split,
    )
    assert first.tokenizer.fingerprint == again.tokenizer.fingerprint
    assert again.counts["train_documents"] == 4
    assert again.counts["train_tokens"] == again.train.num_tokens
    assert (again.tokenizer_directory / "tokenizer.json").exists()


def test_other_rows_of_the_same_shards_need_no_new_preparation(
    settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path
) -> None:
    data, tokenizer = settings
    prepare(data, tokenizer, tmp_path / "run")
    prepare(DataConfig(data.source, data.paths, sequence_length=99, mask_documents=False), tokenizer, tmp_path / "run")


def test_other_settings_are_refused_by_name(settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path) -> None:
    data, tokenizer = settings
    prepare(data, tokenizer, tmp_path / "run")
    changed = DataConfig(data.source, data.paths, validation_fraction=0.1)
    with pytest.raises(InputError, match=r"data.validation_fraction=0.1 \(there: 0.05\): .* other settings"):
        prepare(changed, tokenizer, tmp_path / "run")
    with pytest.raises(InputError, match=r"tokenizer.vocab_size=800 \(there: 700\)"):
        prepare(data, TokenizerConfig(vocab_size=800), tmp_path / "run")


def test_prepare_goes_on_after_an_interruption(settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path) -> None:
    data, tokenizer = settings
    whole = prepare(data, tokenizer, tmp_path / "whole")
    prepare(data, tokenizer, tmp_path / "cut")
    (tmp_path / "cut" / "data" / "manifest.json").unlink()
    (tmp_path / "cut" / "data" / "train.tokens.bin").write_bytes(b"half")
    again = prepare(data, tokenizer, tmp_path / "cut")
    assert np.array_equal(again.train.tokens, whole.train.tokens)


def test_a_damaged_manifest_and_a_foreign_tokenizer_are_sentences(
    settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path
) -> None:
    data, tokenizer = settings
    prepared = prepare(data, tokenizer, tmp_path / "run")
    other = prepare(data, TokenizerConfig(vocab_size=800), tmp_path / "other")
    (prepared.tokenizer_directory / "tokenizer.model").write_bytes(other.tokenizer.model_bytes)
    with pytest.raises(InputError, match="is not the tokenizer that the token shards"):
        prepare(data, tokenizer, tmp_path / "run")
    (tmp_path / "run" / "data" / "manifest.json").write_text('{"format": 1')
    with pytest.raises(InputError, match=r"manifest.json: cannot be read"):
        prepare(data, tokenizer, tmp_path / "run")


def test_a_given_tokenizer_is_used(settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path) -> None:
    data, tokenizer = settings
    trained = prepare(data, tokenizer, tmp_path / "run")
    model = trained.tokenizer_directory / "tokenizer.model"
    given = prepare(data, TokenizerConfig(path=str(model)), tmp_path / "other")
    assert given.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert np.array_equal(given.train.tokens, trained.train.tokens)


def test_text_too_small_for_one_row_names_the_sizes(
    settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path
) -> None:
    data, tokenizer = settings
    prepared = prepare(data, tokenizer, tmp_path / "run")
    tokens = prepared.train.num_tokens
    prepare(DataConfig(data.source, data.paths, sequence_length=tokens - 1), tokenizer, tmp_path / "run")
    with pytest.raises(
        InputError, match=rf"data.sequence_length={tokens}: .* only {tokens} tokens .*at most {tokens - 1}"
    ):
        prepare(DataConfig(data.source, data.paths, sequence_length=tokens), tokenizer, tmp_path / "run")


def test_processes_preparing_at_once_agree(settings: tuple[DataConfig, TokenizerConfig], tmp_path: Path) -> None:
    data, tokenizer = settings
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=(data, tokenizer, tmp_path / "run")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    prepare(data, tokenizer, tmp_path / "alone")
    for path in (tmp_path / "alone").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "alone")).read_bytes()
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class LargeTokenizer:
        vocab_size, bos_id, eos_id, pad_id = 100_000, 1, 2, 3

        def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
            return [[99_999] * len(text) for text in texts]

    shard = write_shard([Document("a", "abc")], LargeTokenizer(), tmp_path, "large")  # type: ignore[arg-type]
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens.tolist() == [1, 99_999, 99_999, 99_999, 2]


def test_documents_larger_than_a_tokenizing_batch_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, make_shard: MakeShard, random_texts: list[str]
) -> None:
    whole = make_shard(random_texts)
    monkeypatch.setattr("moe_lm.data.shards.ENCODE_CHARACTERS", 50)
    assert np.array_equal(make_shard(random_texts).tokens, whole.tokens)


def test_public_text_compresses(outside_data: Path, tmp_path: Path) -> None:
    data = DataConfig(source=DataSource.text, paths=[str(outside_data / "tinyshakespeare.txt")])
    prepared = prepare(data, TokenizerConfig(), tmp_path)
    assert prepared.train.num_bytes / prepared.train.num_tokens > 3
    start = random.Random(0).randrange(prepared.train.num_tokens // 2)
    text = prepared.tokenizer.decode(prepared.train.tokens[start : start + 500].tolist())
    assert text.strip("\ufffd") in (outside_data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"] == prepared.counts
