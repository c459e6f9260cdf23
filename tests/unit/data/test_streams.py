"""The promise of the data path: the same global batches on any number of processes, after any restart.

A process's share is a pure function of configuration, state and rank, so most of it needs no processes; real ones over
gloo are in tests/distributed/test_data.py.
"""

import gzip
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from moe_lm.data import streams as streams_module
from moe_lm.data.batch import Batch
from moe_lm.data.config import DataConfig, DataSource, OnBadRow, Packing, SourceConfig
from moe_lm.data.documents import Document, Split, SplitWay
from moe_lm.data.encode import Encoder, encode
from moe_lm.data.loader import BatchPlan, Loader, ShardLoader, StepBatch
from moe_lm.data.mixture import Mixture
from moe_lm.data.shards import TokenArray
from moe_lm.data.sources import Source, open_sources
from moe_lm.data.streams import SourceStreams, StreamLoader, check_world_size, merge_states
from moe_lm.errors import InputError
from tests.unit.data.conftest import ByteTokenizer

KINDS = ("shards", "text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "huggingface")
NUM_DOCUMENTS = 61
NOTHING_HELD_OUT = Split(SplitWay.train_all, 0.5)


def make_texts(seed: int) -> list[str]:
    """Documents of very different lengths, some longer than any row of these tests."""
    rng = random.Random(seed)
    return [f"{i}:" + "".join(rng.choices("abcdé \n", k=rng.choice((0, 3, 20, 150)))) for i in range(NUM_DOCUMENTS)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Source]]:
    """Two small sources of every kind that is streamed."""
    directory = tmp_path_factory.mktemp("corpora")
    made: dict[str, list[Source]] = {}
    for kind in KINDS[1:]:
        sources = {}
        for name in ("one", "two"):
            paths = write_corpus(directory / kind.replace(".", "_") / name, kind, make_texts(len(name) + ord(name[0])))
            sources[name] = SourceConfig(paths=[str(paths)], weight=1.0)
        made[kind] = open_sources(DataConfig(source=DataSource[kind.split(".")[0]], sources=sources, streaming=True))
    return made


def write_corpus(directory: Path, kind: str, texts: list[str]) -> Path:
    directory.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    half = lines.index(b"\n", len(lines) // 2) + 1
    if kind == "text":
        for index, text in enumerate(texts):
            (directory / f"{index:03}.txt").write_text(text)
    elif kind.startswith("jsonl"):
        for index, part in enumerate((lines[:half], lines[half:])):
            path = directory / f"{index}.{kind}"
            if kind == "jsonl.zst":
                with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
                    file.write(part)
            else:
                path.write_bytes(gzip.compress(part) if kind == "jsonl.gz" else part)
    elif kind == "arrow":
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_file(str(directory / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        parquet.write_table(pyarrow.table({"text": texts}), directory / "a.parquet", row_group_size=9)
    return directory


def arrays_of(seed: int) -> TokenArray:
    """The documents as a token array in memory."""
    encoded = encode(ByteTokenizer(), make_texts(seed))
    starts = np.cumsum(encoded.lengths) - encoded.lengths
    return TokenArray(encoded.tokens, starts, np.zeros(len(starts), dtype=np.uint16), ["all"])


def open_loader(
    kind: str,
    corpora: dict[str, list[Source]],
    mixture: Mixture,
    plan: BatchPlan,
    num_streams: int,
    state: dict[str, Any],
) -> Loader:
    names = ["one", "two"][: mixture.num_sources]
    if kind == "shards":
        return ShardLoader([[arrays_of(len(name) + ord(name[0]))] for name in names], names, mixture, plan)
    encoder = Encoder(ByteTokenizer(), Path(), workers=0)
    sources = [replace(source, bad=source.bad) for source in corpora[kind][: len(names)]]
    return StreamLoader(
        [SourceStreams(s, NOTHING_HELD_OUT, encoder, plan, num_streams, state.get(s.name)) for s in sources],
        names,
        mixture,
        plan,
    )


def run_ranks(
    kind: str,
    corpora: dict[str, list[Source]],
    mixture: Mixture,
    plan: BatchPlan,
    num_streams: int,
    world_size: int,
    steps: range,
    state: dict[str, Any],
) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
    """The global batch of each step, put together from the ranks' shares, and the state of all behind it."""
    micro = plan.global_batch_size // world_size
    shares = [replace(plan, rank=rank, world_size=world_size, micro_batch_size=micro) for rank in range(world_size)]
    loaders = [open_loader(kind, corpora, mixture, share, num_streams, state) for share in shares]
    for step in steps:
        given = [loader.step(step) for loader in loaders]
        whole = merge_states([json.loads(json.dumps(share.state)) for share in given])
        yield interleave(given), json.loads(json.dumps(whole))


def interleave(shares: list[StepBatch]) -> list[torch.Tensor]:
    """Row n of the run is row n div W of rank n mod W."""
    whole = []
    for field in fields(Batch):
        of_ranks = [torch.cat([getattr(batch, field.name) for batch in share.micro_batches]) for share in shares]
        whole.append(torch.stack(of_ranks, dim=1).flatten(0, 1))
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_depend_on_processes_or_restarts(
    kind: str, corpora: dict[str, list[Source]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows that are repeated, lost or moved when a run goes on with another number of processes: 208
    random cases, nearly all over a border of epochs, token for token."""
    monkeypatch.setattr(streams_module, "STREAM_CHARACTERS", 90)
    monkeypatch.setattr(streams_module, "STREAM_ROWS", 1)
    rng = random.Random(KINDS.index(kind))
    epochs_crossed = 0
    cases = 12 if kind == "huggingface" else 28
    for case in range(cases):
        num_streams = rng.choice((1, 2, 3, 4, 6, 8, 12))
        sizes = [size for size in range(1, 13) if num_streams % size == 0]
        before, after = rng.choice(sizes), rng.choice(sizes)
        batch = math.lcm(before, after) * rng.randint(1, 3)
        weights = rng.choice((np.ones(1), np.array([1.0, 1.0]), np.array([0.7, 0.3])))
        packing = rng.choice((Packing.sequential, Packing.best_fit))
        length = rng.choice((8, 33, 64))
        plan = BatchPlan(
            rng.randrange(2**31), batch, batch, length, ByteTokenizer.pad_id, ["all", "one", "two"], True, packing
        )
        rows = 3 * sum(len(text) + 1 for text in make_texts(0)) // length
        last = min(-(-rows // batch), 100)
        change = rng.randrange(1, last)
        arguments = (kind, corpora, Mixture(weights), plan, num_streams)
        reference = list(run_ranks(*arguments, 1, range(last), {}))
        first = list(run_ranks(*arguments, before, range(change), {}))
        then = list(run_ranks(*arguments, after, range(change, last), first[-1][1]))
        for step, ((expected, _), (found, _)) in enumerate(zip(reference, first + then, strict=True)):
            for one, other in zip(expected, found):
                assert torch.equal(one, other), (case, step, num_streams, before, after, change)
        states = reference[-1][1].values()
        epochs_crossed += kind == "shards" or any(s[0] > 0 for of in states for s in of["streams"].values())
    assert epochs_crossed >= 0.75 * cases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize(("num_streams", "epochs"), [(1, 1), (3, 2), (4, 1)])
def test_an_epoch_has_every_token_once(
    kind: str,
    packing: Packing,
    num_streams: int,
    epochs: int,
    corpora: dict[str, list[Source]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches documents that are lost, cut or given twice within the epochs that were asked for, and an end of data
    that is not noticed."""
    monkeypatch.setattr(streams_module, "STREAM_CHARACTERS", 90)
    monkeypatch.setattr(streams_module, "STREAM_ROWS", 1)
    domains = ["all", "one", "two"]
    plan = BatchPlan(5, 4, 4, 24, ByteTokenizer.pad_id, domains, packing=packing, epochs=epochs)
    loader = open_loader(kind, corpora, Mixture(np.ones(1)), plan, num_streams, {})
    targets: Counter[int] = Counter()
    for step in itertools.count() if loader.num_steps is None else range(loader.num_steps):
        share = loader.step(step)
        if not share.live_sources.all():
            break
        labels = share.micro_batches[0].labels
        assert share.num_targets == (labels >= 0).sum()
        assert share.domain_tokens.sum() == share.micro_batches[0].routing_mask.sum()
        targets.update(labels[labels >= 0].tolist())
    name = "one"
    expected = Counter(
        token
        for ids in ByteTokenizer().encode_batch(make_texts(len(name) + ord(name[0])))
        for token in [*ids, ByteTokenizer.eos_id]
    )
    assert targets == Counter({token: epochs * count for token, count in expected.items()})


def test_a_stream_keeps_to_its_documents(corpora: dict[str, list[Source]]) -> None:
    """Catches rows in which a document goes on as another one, or attention that crosses documents."""
    plan = BatchPlan(5, 4, 4, 24, ByteTokenizer.pad_id, ["one"])
    loader = open_loader("jsonl", corpora, Mixture(np.ones(1)), plan, 2, {})
    texts = set(make_texts(len("one") + ord("o")))
    joined = "\0".join(texts)
    for step in range(30):
        for batch in loader.step(step).micro_batches:
            for ids, documents in zip(batch.input_ids, batch.document_ids):
                for document in range(1, int(documents.max()) + 1):
                    piece = bytes(t - 4 for t in ids[documents == document].tolist() if t >= 4).decode(errors="ignore")
                    assert piece.strip("é") in joined or piece[1:-1] in joined


def test_every_epoch_is_shuffled_anew_and_seeds_differ(corpora: dict[str, list[Source]]) -> None:
    """Catches an order that repeats."""
    plan = BatchPlan(5, 4, 4, 64, ByteTokenizer.pad_id, ["one"])
    orders = []
    for seed in (5, 6):
        loader = open_loader("jsonl", corpora, Mixture(np.ones(1)), replace(plan, seed=seed), 1, {})
        rows = [tuple(row.tolist()) for step in range(60) for row in loader.step(step).micro_batches[0].input_ids]
        orders.append(rows)
        per_epoch = len(rows) // 3
        assert len(set(rows[:per_epoch]) - set(rows[per_epoch : 2 * per_epoch])) > per_epoch // 2
    assert orders[0] != orders[1]


def test_held_out_documents_are_never_given(corpora: dict[str, list[Source]]) -> None:
    """Catches a stream that trains on what it is validated with."""
    split = Split(SplitWay.hash, 0.2)
    source = corpora["jsonl"][0]
    held_out = {side.text.split(":")[0] for document, _ in source.read() if (side := split.sides(document)[1])}
    assert len(held_out) > 2
    # Best fit, so that no document's number is cut in two.
    plan = BatchPlan(5, 4, 4, 300, ByteTokenizer.pad_id, ["one"], packing=Packing.best_fit)
    streams = SourceStreams(source, split, Encoder(ByteTokenizer(), Path(), 0), plan, 2)
    seen = set()
    for number in range(80):
        array, rows, row = streams.next_row(number % 2)
        for first, length in zip(*rows.pieces(np.array([row]))[2:]):
            text = bytes(t - 4 if t >= 4 else 0 for t in array.tokens[first : first + length].tolist())
            seen |= {part.split(b":")[0].decode() for part in text.split(b"\0") if b":" in part}
    assert seen and not seen & held_out


@pytest.mark.parametrize("epochs", [None, 1, 3])
def test_fewer_documents_than_streams_are_refused(tmp_path: Path, epochs: int | None) -> None:
    """Catches streams that all give the same rows of the same few documents at once, each in an epoch of its own, or a
    run that waits for ever on the stream that never gets one."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"to be {number} or not to be {number} " * 40)
    source = open_sources(DataConfig(source=DataSource.text, paths=[str(tmp_path)]))[0]
    plan = BatchPlan(5, 12, 12, 16, ByteTokenizer.pad_id, ["text"], epochs=epochs)

    def loader(num_streams: int) -> StreamLoader:
        streams = SourceStreams(source, NOTHING_HELD_OUT, Encoder(ByteTokenizer(), Path(), 0), plan, num_streams)
        return StreamLoader([streams], ["text"], Mixture(np.ones(1)), plan)

    with pytest.raises(InputError, match=r"data.num_streams=4: the documents of data.paths reach 3 of"):
        loader(4).step(0)
    state = loader(3).step(0).state["text"]
    state["streams"] = {str(stream): [0, 0, 0] for stream in range(4)}
    # A run that has begun so can not change its streams: it goes on.
    begun = SourceStreams(source, NOTHING_HELD_OUT, Encoder(ByteTokenizer(), Path(), 0), plan, 4, state)
    assert (begun.next_row(3) is None) == (epochs == 1)
    given = loader(3)
    for step in range(4):
        batch = given.step(step)
        rows = torch.cat([micro_batch.input_ids for micro_batch in batch.micro_batches])
        assert batch.num_targets > 150 and len(rows.unique(dim=0)) == 12


def test_a_source_without_text_is_named(tmp_path: Path) -> None:
    """Catches a stream that reads an empty source over and over again."""
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n' * 5)
    source = open_sources(DataConfig(source=DataSource.jsonl, paths=[str(tmp_path)]))[0]
    plan = BatchPlan(5, 2, 2, 16, ByteTokenizer.pad_id, ["jsonl"])
    streams = SourceStreams(source, NOTHING_HELD_OUT, Encoder(ByteTokenizer(), Path(), 0), plan, 2)
    with pytest.raises(InputError, match=r"data.paths: there is no text to train on"):
        streams.next_row(0)


def test_skipped_rows_do_not_move_a_resumed_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches positions that count only good rows."""
    monkeypatch.setattr(streams_module, "STREAM_CHARACTERS", 40)
    monkeypatch.setattr(streams_module, "STREAM_ROWS", 1)
    lines = [json.dumps({"text": text}) if i % 3 else '{"text": ' for i, text in enumerate(make_texts(7))]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    sources = {"one": SourceConfig(paths=[str(tmp_path)])}
    config = DataConfig(source=DataSource.jsonl, sources=sources, on_bad_row=OnBadRow.skip, streaming=True)
    corpora = {"jsonl": open_sources(config)}
    plan = BatchPlan(5, 6, 6, 16, ByteTokenizer.pad_id, ["one"])
    whole = list(run_ranks("jsonl", corpora, Mixture(np.ones(1)), plan, 6, 1, range(30), {}))
    for change in (3, 17, 29):
        again = list(
            run_ranks("jsonl", corpora, Mixture(np.ones(1)), plan, 6, 2, range(change, 30), whole[change - 1][1])
        )
        for (expected, _), (found, _) in zip(whole[change:], again, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(expected, found))
    assert corpora["jsonl"][0].bad.skipped["broken_json"] > 20


def test_streams_of_a_block_are_about_equally_long() -> None:
    """Catches streams that drift apart, so that what one has too much of piles up in memory."""
    rng = random.Random(1)
    documents = [Document(str(i), "x" * int(rng.lognormvariate(6, 1.5))) for i in range(3000)]
    hands = streams_module._deal_by_length(documents, 12)
    sizes = [sum(len(document.text) for document in hand) for hand in hands]
    assert sorted(d.name for hand in hands for d in hand) == sorted(d.name for d in documents)
    assert max(sizes) - min(sizes) <= max(len(document.text) for document in documents)


def test_the_number_of_processes_must_divide_the_streams() -> None:
    """Catches a process with fewer streams than its peers, at the start instead of in the middle."""
    check_world_size(12, 6)
    with pytest.raises(InputError, match=r"data.num_streams=12: must be a multiple of the number of processes, 5"):
        check_world_size(12, 5)


def test_state_is_small(corpora: dict[str, list[Source]]) -> None:
    """Catches tokens, or anything else that grows, in a stream's state."""
    plan = BatchPlan(5, 12, 12, 16, ByteTokenizer.pad_id, ["one"])
    for kind in KINDS[1:]:
        loader = open_loader(kind, corpora, Mixture(np.ones(1)), plan, 12, {})
        sizes = [len(json.dumps(loader.step(step).state)) for step in range(40)]
        assert max(sizes) < (8000 if kind == "huggingface" else 1000), (kind, max(sizes))
