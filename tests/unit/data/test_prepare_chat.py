"""`prepare` of conversations: what is learned of them, whatever way a set is made, and what is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.data import chunks
from moe_lm.data.batch import IGNORED, Batch, make_batch
from moe_lm.data.config import DataConfig, DataSource, OnBadRow, Packing, SourceConfig, TokenizerConfig, TooLong
from moe_lm.data.documents import Split, SplitWay
from moe_lm.data.loader import BatchPlan, ShardLoader, validation_batches
from moe_lm.data.mixture import make_mixture
from moe_lm.data.prepare import Part, prepare
from moe_lm.data.prepared import load
from moe_lm.data.rows import RowSet
from moe_lm.data.shards import TokenArray, TokenShard
from moe_lm.data.sources import open_sources
from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer
from moe_lm.errors import InputError
from moe_lm.evaluation.compressors import document_bytes


def conversation(number: int) -> dict[str, Any]:
    """One of some length, with one answer or more."""
    turns = [{"role": "user", "content": f"question {number}: " + "what else? " * (number % 5)}]
    turns += [{"role": "assistant", "content": f"answer {number}, é </s>"}]
    return {"messages": turns * (1 + number % 2), "kind": f"kind{number % 3}"}


def answers_of(rows: list[dict[str, Any]]) -> list[str]:
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"]


ROWS = [conversation(number) for number in range(120)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer_config(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    directory = tmp_path_factory.mktemp("base")
    tokenizer.save(directory, 512)
    return TokenizerConfig(path=str(directory))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Conversations in two files."""
    write(tmp_path / "chats/a.jsonl", ROWS[:70])
    write(tmp_path / "chats/b.jsonl", ROWS[70:])
    return DataConfig(source=DataSource.chat, paths=[str(tmp_path / "chats")], workers=0, sequence_length=200)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units, chunks and batches so small that these tests have many of each."""
    monkeypatch.setattr(chunks, "UNIT_BYTES", 3000)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 900)
    monkeypatch.setattr(chunks, "BATCH_CHARACTERS", 700)


def said(shards: list[TokenShard], decode: Callable[[list[int]], str]) -> list[str]:
    """What each span of targets says."""
    return [decode(s.tokens[begin:end].tolist()) for s in shards if s.spans is not None for begin, end in s.spans]


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_every_answer_is_learned_or_held_out(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path, small_chunks: None
) -> None:
    """Catches spans that are shifted between batches, sides, chunks or units, and bytes that are not the answers'."""
    lines: list[str] = []
    assert prepare(config, tokenizer_config, tmp_path / "set", report=lines.append)
    data = load(config, tokenizer_config, tmp_path / "set")
    decode = data.tokenizer.decode
    train, held_out = said(data.train["chat"], decode), said(data.validation, decode)
    assert sorted(train + held_out) == sorted(answers_of(ROWS)) and len(held_out) > 3
    assert document_bytes(data.validation, data.tokenizer).decode() == "".join(held_out)
    assert sum(s.header.num_bytes for s in data.validation) == len("".join(held_out).encode())
    for side, shards in (("train", data.train["chat"]), ("validation", data.validation)):
        targets = sum(s.num_targets for s in shards)
        assert targets == data.counts[f"{side}_assistant_tokens"] < data.counts[f"{side}_tokens"]
        assert f"{targets:,}" in " ".join(lines)
        for shard in shards:
            assert shard.spans is not None
            ends = [int(shard.tokens[end - 1]) for _, end in shard.spans]
            assert ends == [data.tokenizer.eos_id] * len(ends)


def test_a_set_of_conversations_is_the_same_however_made(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path, small_chunks: None
) -> None:
    """Catches shards, or counts of what is left out, that depend on workers, parts or an interruption."""
    write(tmp_path / "chats/b.jsonl", [*ROWS[70:90], {"messages": []}, *ROWS[90:]])
    config = dataclasses.replace(config, on_bad_row=OnBadRow.skip, too_long=TooLong.skip, sequence_length=45)
    assert prepare(config, tokenizer_config, tmp_path / "one")
    made = content(tmp_path / "one")
    skipped = json.loads(made["data/manifest.json"])["skipped"]
    assert skipped["no_messages"] == 1 and skipped["too_long"] > 10
    assert prepare(dataclasses.replace(config, workers=2), tokenizer_config, tmp_path / "two")
    assert not prepare(config, tokenizer_config, tmp_path / "three", part=Part(2, 2))
    assert prepare(config, tokenizer_config, tmp_path / "three", part=Part(1, 2))
    assert content(tmp_path / "two") == content(tmp_path / "three") == made
    (tmp_path / "two/data/manifest.json").unlink()
    for path in sorted((tmp_path / "two/data").glob("*/*.json"))[1::2]:
        path.unlink()
    assert prepare(config, tokenizer_config, tmp_path / "two")
    assert content(tmp_path / "two") == made


def test_held_out_conversations_beside_texts_are_rendered(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """Catches a validation set whose conversations are taken for text, with their braces and quotes."""
    (tmp_path / "text.txt").write_text("Some text to go on with. " * 500)
    texts = {"a": SourceConfig(DataSource.text, [str(tmp_path / "text.txt")])}
    mixed = dataclasses.replace(config, sources=texts, paths=[], validation_paths=config.paths)
    prepare(mixed, tokenizer_config, tmp_path / "set")
    data = load(mixed, tokenizer_config, tmp_path / "set")
    assert all(shard.spans is not None for shard in data.validation)
    assert "role" not in "".join(said(data.validation, data.tokenizer.decode))


def test_what_can_not_be_trained_on_is_a_sentence(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """Catches a mistake that ends in a traceback, without its place, with something left behind as complete, or in a
    directory that refuses the setting that the sentence asks for."""

    def refused(match: str, tokenizer: TokenizerConfig = tokenizer_config, **changes: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            prepare(dataclasses.replace(config, **changes), tokenizer, tmp_path / "set")
        assert str(caught.value).count("\n") == 0 and not (tmp_path / "set/data/manifest.json").exists()

    refused(r"^data.paths: .*a.jsonl, line \d+: the conversation has \d+ tokens, .*at least \d+,", sequence_length=20)
    refused(r"^tokenizer.path=null: conversations are too little text", tokenizer=TokenizerConfig())
    few = write(tmp_path / "few.jsonl", ROWS[:19])
    refused(
        r"^data.paths: holds too few conversations .*\(at least 20\), a larger .*, or data.validation_paths\.$",
        paths=[few],
    )
    (tmp_path / "fails.jinja").write_text("{{ raise_exception('no') }}")
    fails = str(tmp_path / "fails.jinja")
    what = r"^data.chat_template=.*fails.jinja: .*a.jsonl, line \d+: the chat template fails \(no\)"
    refused(rf"{what}; mend the template or that row, or set data.on_bad_row=skip\.$", chat_template=fails)
    sentence = (
        rf"{what}; no row is left to hold out \(left out: 120 × template failed\); mend the template or that row\.$"
    )
    refused(sentence, chat_template=fails, on_bad_row=OnBadRow.skip)
    (tmp_path / "fails.jinja").write_text("the same for all")
    refused(r"^data.chat_template=.*: the chat template writes nothing as the assistant's; mend", chat_template=fails)
    three = [write(tmp_path / "three.jsonl", [{"messages": []}] * 3)]
    refused(
        r"^data.paths: holds too few conversations .* \(left out: 3 × no messages\); give more \(at least 20\)",
        paths=three,
        on_bad_row=OnBadRow.skip,
    )
    bad = write(tmp_path / "bad/x.jsonl", [*ROWS[:30], {"messages": [{"role": "user", "content": "?"}]}])
    refused(r"^data.paths: .*x.jsonl, line 31: no message is the assistant's", paths=[bad])
    refused(
        r"^data.validation_paths: .*three.jsonl, line 1: the conversation has no message; no row is left to hold out "
        r"\(left out: 3 × no messages\); mend or remove it\.$",
        validation_paths=three,
        on_bad_row=OnBadRow.skip,
    )
    with pytest.raises(InputError, match=r"^data.streaming=true: conversations are prepared"):
        dataclasses.replace(config, streaming=True)
    with pytest.raises(InputError, match=r"^data.chat_template=x: data.source=stdlib is not rendered by a template"):
        DataConfig(chat_template="x")


def test_conversations_of_which_none_can_be_held_out_are_refused(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """Catches a set without validation, where those that were to be held out are too long and left out."""
    split, (source,) = Split(SplitWay.hash, config.validation_fraction), open_sources(config)
    held_out = [number for number, (document, _) in enumerate(source.read()) if split.sides(document)[1]]
    longer = {"messages": [{"role": role, "content": "too long " * 200} for role in ("user", "assistant")]}
    rows = [longer if number in held_out else row for number, row in enumerate(ROWS)]
    write(tmp_path / "chats/a.jsonl", rows[:70])
    write(tmp_path / "chats/b.jsonl", rows[70:])
    config = dataclasses.replace(config, too_long=TooLong.skip, on_bad_row=OnBadRow.skip)
    with pytest.raises(InputError, match=r"^data.validation_fraction: .*; give more text, or data.validation_paths\.$"):
        prepare(config, tokenizer_config, tmp_path / "set")
    assert held_out and not (tmp_path / "set/data/manifest.json").exists()


def test_another_template_or_length_is_another_set(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """Catches a run that goes on with shards of another template, and shards of texts that depend on the length."""
    assert prepare(config, tokenizer_config, tmp_path / "set")
    own = (tmp_path / "set/tokenizer/chat_template.jinja").read_text()
    (tmp_path / "same.jinja").write_text(own)
    (tmp_path / "other.jinja").write_text(own.replace("<|end|>", "<|end|>\n"))
    assert prepare(
        dataclasses.replace(config, chat_template=str(tmp_path / "same.jinja")), tokenizer_config, tmp_path / "set"
    )
    for changes, name in (
        ({"chat_template": str(tmp_path / "other.jinja")}, "data.chat_template"),
        ({"sequence_length": 300}, "data.sequence_length=300 "),
        ({"too_long": TooLong.cut}, "data.too_long='cut'"),
    ):
        with pytest.raises(InputError, match=rf"^{name}.* was prepared with other settings"):
            prepare(dataclasses.replace(config, **changes), tokenizer_config, tmp_path / "set")
    assert tokenizer_config.path is not None
    (tmp_path / "copy").mkdir()
    for path in Path(tokenizer_config.path).iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    for name in ("copy", "gone"):  # it is known by what it is, and by its copy in the set
        assert prepare(config, TokenizerConfig(path=str(tmp_path / name)), tmp_path / "set")


def test_a_prepared_set_says_which_rows_are_too_short(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """Catches conversations of a prepared set that are cut in two by a smaller sequence length."""
    prepare(config, tokenizer_config, tmp_path / "set")
    again = DataConfig(source=DataSource.prepared, paths=[str(tmp_path / "set")], sequence_length=200)
    assert load(again, TokenizerConfig(), tmp_path / "run").tokenizer.chat_template
    with pytest.raises(InputError, match=r"^data.sequence_length=30: there is a conversation of \d+ tokens"):
        load(dataclasses.replace(again, sequence_length=30), TokenizerConfig(), tmp_path / "run")


def test_conversations_and_texts_mix(tokenizer_config: TokenizerConfig, tmp_path: Path) -> None:
    """Catches texts that lose targets beside conversations, or conversations that are cut as texts are."""
    chats, texts = write(tmp_path / "c.jsonl", ROWS), write(tmp_path / "t.jsonl", [{"text": "abc " * 50}] * 30)
    sources = {
        "chats": SourceConfig(source=DataSource.chat, paths=[chats], weight=1.0, domain_field="kind"),
        "texts": SourceConfig(source=DataSource.jsonl, paths=[texts], weight=1.0),
    }
    config = DataConfig(source=DataSource.jsonl, sources=sources, workers=0, sequence_length=200)
    prepare(config, tokenizer_config, tmp_path / "set")
    data = load(config, tokenizer_config, tmp_path / "set")
    assert data.domains == ["kind0", "kind1", "kind2", "texts"]
    assert all(s.spans is not None for s in data.train["chats"]) and all(s.spans is None for s in data.train["texts"])
    names = sorted(data.train)
    plan = BatchPlan(1, 8, 8, 200, data.tokenizer.pad_id, data.domains)
    loader = ShardLoader([data.train[n] for n in names], names, make_mixture(config, data.train, 80), plan)
    batch = loader.step(0).micro_batches[0]
    is_text = batch.domain_ids == 3
    documents = is_text & batch.routing_mask & (batch.input_ids != data.tokenizer.eos_id)
    assert (batch.labels[documents] != IGNORED).all() and documents.any()
    chat = ~is_text & batch.routing_mask
    share = (batch.labels[chat] != IGNORED).float().mean()
    assert 0.1 < share < 0.9


SPAN_LENGTHS = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=6), max_size=25)


def array_of(documents: list[list[int]]) -> TokenArray:
    """Documents of runs of tokens, of which every second is a target; every token's id is its place."""
    starts, spans, place = [], [], 0
    for runs in documents:
        starts.append(place)
        place += 1
        for number, length in enumerate(runs):
            if number % 2:
                spans.append((place, place + length))
            place += length
    spans_N2 = np.array(spans, dtype=np.int64).reshape(-1, 2)
    zeros = np.zeros(len(starts), np.uint16)
    return TokenArray(np.arange(place, dtype=np.uint16), np.array(starts, dtype=np.int64), zeros, ["text"], spans_N2)


def targets_of(batches: list[Batch]) -> list[int]:
    return [t for batch in batches for t in batch.labels[batch.labels != IGNORED].tolist()]


@settings(deadline=None, max_examples=200)
@given(documents=SPAN_LENGTHS, room=st.integers(42, 60), packing=st.sampled_from(Packing), batch_size=st.integers(1, 5))
def test_each_target_of_a_span_is_in_one_row_once(
    documents: list[list[int]], room: int, packing: Packing, batch_size: int
) -> None:
    """Catches targets lost, repeated or taken from outside of spans by packing, whatever packing is asked for."""
    array = array_of(documents)
    assert array.spans is not None
    inside = [place for begin, end in array.spans.tolist() for place in range(begin, end)]
    rows = RowSet([array], room, packing)
    if rows.num_rows:
        every = np.arange(rows.num_rows)
        batch = make_batch(rows.pieces(every, every[::-1].copy()), rows.num_rows, room, route_prompts=False)
        assert sorted(targets_of([batch])) == inside and array.num_targets == len(inside)
        # Each target is behind its own input, in its own document; documents are whole.
        place = batch.labels != IGNORED
        assert (batch.labels[place] - 1 == batch.input_ids[place]).all()
        first = torch.from_numpy(array.starts)[
            torch.searchsorted(torch.from_numpy(array.starts), batch.labels, right=True) - 1
        ]
        assert (batch.position_ids[place] == (batch.input_ids - first)[place]).all()
        assert (batch.routing_mask == place).all()
    shared = [b for rank in range(2) for b in validation_batches([array], batch_size, room, rank=rank, world_size=2)]
    assert sorted(targets_of(shared)) == inside


def test_prompts_count_in_routing_unless_told_otherwise() -> None:
    """Catches a switch that changes inputs, positions or padding, or does nothing."""
    array = array_of([[3, 2, 1, 4], [2, 5]])
    rows = RowSet([array], 20, Packing.best_fit)
    every = np.arange(rows.num_rows)
    with_prompts, without = (
        make_batch(rows.pieces(every, every), rows.num_rows, 20, route_prompts=route) for route in (True, False)
    )
    assert with_prompts.routing_mask.sum() == array.num_tokens - array.num_documents
    assert without.routing_mask.sum() == array.num_targets == 11
    for name in ("input_ids", "labels", "position_ids", "document_ids", "domain_ids"):
        assert (getattr(with_prompts, name) == getattr(without, name)).all()


def test_a_damaged_index_of_targets_is_found(
    config: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """Catches training on other targets than were written, after a bit has flipped or the file is gone."""
    prepare(config, tokenizer_config, tmp_path / "set")
    path = next((tmp_path / "set/data/chat").glob("*.train.spans.npy"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match=r"spans.npy: is not what was written"):
        load(config, tokenizer_config, tmp_path / "set")
    path.unlink()
    with pytest.raises(InputError, match=r"cannot be read"):
        load(config, tokenizer_config, tmp_path / "set")
