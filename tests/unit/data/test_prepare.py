"""`prepare`: whatever way a set is made, it is the same; and whatever has changed is said."""

import dataclasses
import errno
import itertools
import json
import multiprocessing.context
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lm.data import chunks, encode
from moe_lm.data import prepare as prepare_module
from moe_lm.data.chunks import ChangedSourceError
from moe_lm.data.config import DataConfig, DataSource, OnBadRow, SourceConfig, TokenizerConfig, TokenizerKind
from moe_lm.data.encode import Encoded, Encoder
from moe_lm.data.prepare import Part, prepare
from moe_lm.data.prepared import PreparedData, load
from moe_lm.errors import InputError, RunError
from tests.models import write_tokenizer
from tests.unit.data.conftest import verify

TOKENIZER = TokenizerConfig(vocab_size=400)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units, chunks and batches so small that these tests have many of each."""
    monkeypatch.setattr(chunks, "UNIT_BYTES", 6000)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 900)
    monkeypatch.setattr(chunks, "BATCH_CHARACTERS", 700)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """A mixture of two sources of several files, one of them with its domains in a field."""
    for name in ("one", "two"):
        directory = tmp_path / "text" / name
        directory.mkdir(parents=True)
        for file in range(5):
            rows = [
                {"text": f"{name} {file} {row}: " + "lines of text, " * (row % 7), "kind": f"{name}{row % 2}"}
                for row in range(40)
            ]
            (directory / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        "one": SourceConfig(paths=[str(tmp_path / "text/one")]),
        "two": SourceConfig(paths=[str(tmp_path / "text/two")], domain_field="kind"),
    }
    return DataConfig(source=DataSource.jsonl, sources=sources, workers=0, sequence_length=16)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def texts_of(data: PreparedData, side: str) -> list[str]:
    """The documents of a side, decoded."""
    shards = data.validation if side == "validation" else [s for of in data.train.values() for s in of]
    texts = []
    for shard in shards:
        verify(shard)
        ends = np.append(shard.starts[1:], shard.num_tokens)
        texts += [data.tokenizer.decode(shard.tokens[a + 1 : b - 1].tolist()) for a, b in zip(shard.starts, ends)]
    return texts


def test_every_document_is_on_one_side_with_its_domain(config: DataConfig, tmp_path: Path, small_chunks: None) -> None:
    """Catches documents that are lost between batches, chunks or units, or that end up on both sides."""
    assert prepare(config, TOKENIZER, tmp_path / "set")
    data = load(config, TOKENIZER, tmp_path / "set")
    rows = [json.loads(line) for path in sorted(tmp_path.rglob("text/**/*.jsonl")) for line in path.open()]
    found = texts_of(data, "train") + texts_of(data, "validation")
    assert sorted(found) == sorted(row["text"] for row in rows)
    assert len(texts_of(data, "validation")) == data.counts["validation_documents"] > 5
    assert data.domains == ["one", "two0", "two1"]
    for shard in data.train["two"]:
        names = [shard.domain_names[domain] for domain in shard.domains.tolist()]
        ends = np.append(shard.starts[1:], shard.num_tokens)
        for name, a, b in zip(names, shard.starts, ends):
            number = int(data.tokenizer.decode(shard.tokens[a + 1 : b - 1].tolist()).split(":")[0].split()[2])
            assert name == f"two{number % 2}"
    assert len(data.train["one"]) > 4, "the sizes of this test make several chunks"


def test_worker_processes_change_nothing(config: DataConfig, tmp_path: Path, small_chunks: None) -> None:
    """Catches results that are written in the order in which workers end."""
    prepare(config, TOKENIZER, tmp_path / "alone")
    prepare(dataclasses.replace(config, workers=2), TOKENIZER, tmp_path / "workers")
    assert content(tmp_path / "alone") == content(tmp_path / "workers")


@pytest.mark.parametrize("num_parts", [2, 3, 7, 40])
def test_parts_join_into_what_one_machine_makes(
    config: DataConfig, tmp_path: Path, small_chunks: None, num_parts: int
) -> None:
    """Catches shards whose borders depend on who made them; parts in one directory, and in directories of their own
    that are copied together."""
    prepare(config, TOKENIZER, tmp_path / "whole")
    done = [prepare(config, TOKENIZER, tmp_path / "shared", part=Part(i, num_parts)) for i in range(num_parts, 0, -1)]
    assert not done[0] and done[-1] and done == sorted(done)
    assert content(tmp_path / "shared") == content(tmp_path / "whole")
    for index in range(1, num_parts + 1):
        prepare(config, TOKENIZER, tmp_path / f"part{index}", part=Part(index, num_parts))
        shutil.copytree(tmp_path / f"part{index}", tmp_path / "joined", dirs_exist_ok=True)
    assert prepare(config, TOKENIZER, tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "whole")


def test_few_batches_are_on_their_way_at_a_time(
    config: DataConfig, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a whole unit held in memory, and tokenizing that waits for each batch to be written."""
    on_their_way: list[int] = []

    class Counted(Encoder):
        def submit(self, *arguments: Any) -> Future[Encoded]:
            on_their_way.append(on_their_way[-1] + 1 if on_their_way else 1)
            return super().submit(*arguments)

        def result(self, future: Future[Encoded]) -> Encoded:
            on_their_way.append(on_their_way[-1] - 1)
            return super().result(future)

    monkeypatch.setattr(prepare_module, "Encoder", Counted)
    monkeypatch.setattr(prepare_module, "start_workers", lambda workers: None)
    monkeypatch.setattr(encode, "start_workers", lambda workers: None)
    assert prepare(dataclasses.replace(config, workers=2), TOKENIZER, tmp_path / "set")
    assert max(on_their_way) == 5 and on_their_way[-1] == 0


@pytest.mark.parametrize("after", [0, 1, 3, 11, 24])
def test_an_interrupted_preparation_goes_on(
    config: DataConfig, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Catches half-written chunks taken for whole ones, work that is done twice, and a result that differs."""
    prepare(config, TOKENIZER, tmp_path / "whole")
    monkeypatch.setattr(Encoder, "result", stop_after(after))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, TOKENIZER, tmp_path / "set")
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "UNIT_BYTES", 6000)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 900)
    monkeypatch.setattr(chunks, "BATCH_CHARACTERS", 700)
    begun = {name: p for name, p in content(tmp_path / "set").items() if name.endswith(".json") and "data/" in name}
    assert not (tmp_path / "set/data/manifest.json").exists() and not list(tmp_path.rglob("set/**/*.tmp"))
    prepare(config, TOKENIZER, tmp_path / "set")
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    assert begun.items() <= content(tmp_path / "set").items()


def stop_after(results: int) -> Callable[..., object]:
    """An `Encoder.result` that is interrupted after so many."""
    original, seen = Encoder.result, 0

    def result(self: Encoder, future: object) -> object:
        nonlocal seen
        seen += 1
        if seen > results:
            raise KeyboardInterrupt
        return original(self, future)  # type: ignore[arg-type]

    return result


def test_parts_of_other_settings_or_other_text_are_not_joined(
    config: DataConfig, tmp_path: Path, small_chunks: None
) -> None:
    """Catches a set that no machine would have made: its parts held out other shares, or files came and went."""
    other = dataclasses.replace(config, validation_fraction=0.2)
    prepare(config, TOKENIZER, tmp_path / "joined", part=Part(1, 2))
    prepare(other, TOKENIZER, tmp_path / "second", part=Part(2, 2))
    shutil.copytree(tmp_path / "second/data", tmp_path / "joined/data", dirs_exist_ok=True)
    with pytest.raises(InputError, match="was made with other settings"):
        prepare(other, TOKENIZER, tmp_path / "joined")
    prepare(config, TOKENIZER, tmp_path / "moving", part=Part(1, 2))
    file = tmp_path / "text/one/0.jsonl"
    file.rename(file.with_name("99.jsonl"))
    with pytest.raises(InputError, match=r"0.jsonl is gone|was not there"):
        prepare(config, TOKENIZER, tmp_path / "moving", part=Part(2, 2))


def test_a_full_disk_leaves_nothing_half_written(
    config: DataConfig, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a chunk whose second half is missing, and temporary files that stay; after it, the command goes on."""
    prepare(config, TOKENIZER, tmp_path / "whole")
    calls = 0

    def save(*arguments: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments, **options)  # type: ignore[arg-type]

    original = np.save
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.raises(OSError, match="No space left"):
            prepare(config, TOKENIZER, tmp_path / "set")
    assert not list((tmp_path / "set").rglob("*.tmp"))
    prepare(config, TOKENIZER, tmp_path / "set")
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_file_in_two_sources_is_refused(config: DataConfig, tmp_path: Path) -> None:
    """Catches a document that is held out of one source and trained on in another."""
    config.sources["two"].paths = [str(tmp_path / "text")]
    with pytest.raises(InputError, match=r"data.sources.two.paths: .*one.*jsonl is in data.sources.one.paths too"):
        prepare(config, TOKENIZER, tmp_path / "set")


def test_output_among_the_text_is_refused(config: DataConfig, tmp_path: Path) -> None:
    """Catches shards that the next preparation reads as text."""
    for output in (tmp_path / "text/one", tmp_path / "text/two/deep/set"):
        with pytest.raises(InputError, match=r"data.sources.(one|two).paths: .*/text/(one|two) holds .*, where "):
            prepare(config, TOKENIZER, output)
    assert not (tmp_path / "text/two/deep").exists() and len(list((tmp_path / "text/one").iterdir())) == 5


def test_text_where_the_set_would_be_written_is_refused(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shards among the user's text, and then the advice to delete them together."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in ("data", "tokenizer"):
        (tmp_path / "text").rename(tmp_path / name)
        for paths in ([name], [f"{name}/one"], [f"{name}/one/3.jsonl"], [f"{name}/**/*.jsonl"]):
            config.sources = {"one": SourceConfig(paths=paths)}
            with pytest.raises(
                InputError, match=rf"data.sources.one.paths: .*jsonl lies in .*/{name}, which this comm"
            ):
                prepare(config, TOKENIZER, Path())
        (tmp_path / name).rename(tmp_path / "text")
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "data").symlink_to("text")
    config.sources = {"one": SourceConfig(paths=["text"])}
    with pytest.raises(InputError, match=r"lies in .*/text, which this command makes for itself"):
        prepare(config, TOKENIZER, Path())
    (tmp_path / "data").unlink()
    held_out = dataclasses.replace(config, validation_paths=["data/0.jsonl"])
    (tmp_path / "text/two").rename(tmp_path / "data")
    with pytest.raises(InputError, match=r"data.validation_paths: .*/data/0.jsonl lies in .*/data, which"):
        prepare(held_out, TOKENIZER, Path())


def test_a_second_call_does_nothing(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches work that is done again, and files that are touched."""
    prepare(config, TOKENIZER, tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    monkeypatch.setattr(prepare_module, "train_tokenizer", None)
    monkeypatch.setattr(prepare_module, "make_chunks", None)
    assert prepare(config, TOKENIZER, tmp_path / "set")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before


@pytest.mark.parametrize("complete", [True, False])
def test_a_changed_source_is_named(
    config: DataConfig, tmp_path: Path, complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shards of old text that pass for the new: after the end, and in the middle of a preparation."""
    if complete:
        prepare(config, TOKENIZER, tmp_path / "set")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "CHUNK_TOKENS", 900)
            patch.setattr(chunks, "BATCH_CHARACTERS", 700)
            patch.setattr(Encoder, "result", stop_after(9))
            with pytest.raises(KeyboardInterrupt):
                prepare(config, TOKENIZER, tmp_path / "set")
    file = tmp_path / "text/one/1.jsonl"
    content_before, status = file.read_bytes(), file.stat()
    cases = {
        r"data.sources.one.paths: .*1.jsonl has changed": lambda: file.write_bytes(content_before.replace(b"o", b"0")),
        r"data.sources.one.paths: 1.jsonl is gone": file.unlink,
    }
    for sentence, change in cases.items():
        change()
        with pytest.raises(InputError, match=sentence):
            prepare(config, TOKENIZER, tmp_path / "set")
        file.write_bytes(content_before)
    os.utime(file, ns=(0, 0))  # another time, the same content: nothing to say
    prepare(config, TOKENIZER, tmp_path / "set")
    new = file.with_name("9.jsonl")
    new.write_text('{"text": "more"}\n')
    with pytest.raises(InputError, match=r"data.sources.one.paths: .*9.jsonl was not there"):
        prepare(config, TOKENIZER, tmp_path / "set")
    assert status.st_size == len(content_before)


def test_other_settings_are_named(config: DataConfig, tmp_path: Path) -> None:
    """Catches a set that is taken for one of other settings; how rows are cut is not one of them."""
    prepare(config, TOKENIZER, tmp_path / "set")
    other = dataclasses.replace(config, on_bad_row=OnBadRow.skip, validation_fraction=0.1)
    with pytest.raises(InputError, match=r"data.on_bad_row='skip' .*data.validation_fraction=0.1 \(there: 0.05\)"):
        prepare(other, TOKENIZER, tmp_path / "set")
    with pytest.raises(InputError, match=r"tokenizer.vocab_size=500 \(there: 400\)"):
        prepare(config, TokenizerConfig(vocab_size=500), tmp_path / "set")
    with pytest.raises(InputError, match=r"data.domains=\['en'\]"):
        prepare(dataclasses.replace(config, domains=["en"]), TOKENIZER, tmp_path / "set")
    prepare(dataclasses.replace(config, sequence_length=99, epochs=3, workers=1), TOKENIZER, tmp_path / "set")


def test_a_file_that_can_not_be_read_is_not_blamed_on_the_output(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches "make room" where a file of text is somebody else's."""

    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(chunks, "sha256", refuse)  # as root nothing is forbidden
    with pytest.raises(InputError, match=r" cannot be read \(Permission denied\)\.$"):
        prepare(config, TOKENIZER, tmp_path / "set")


def test_the_kind_of_tokenizer_is_a_setting(config: DataConfig, tmp_path: Path) -> None:
    """Catches pieces that are taken for characters or the other way round, and a set of the default kind that an
    earlier version could not have made: its manifest names no kind.
    """
    by_character = dataclasses.replace(TOKENIZER, kind=TokenizerKind.character)
    for one, other in itertools.permutations((TOKENIZER, by_character)):
        directory, lines = tmp_path / one.kind.name, list[str]()
        prepare(config, one, directory, report=lines.append)
        with pytest.raises(InputError, match=f"^tokenizer.kind='{other.kind.name}' .there: '{one.kind.name}'.: "):
            prepare(config, other, directory)
        assert prepare(config, one, directory)
    data = load(config, by_character, tmp_path / "character")
    assert all(data.tokenizer.decode([token]) == "i" for token in data.tokenizer.encode("iii"))
    characters = data.tokenizer.vocab_size - 297
    assert f"trained a tokenizer of {data.tokenizer.vocab_size} ids, {characters} of them characters" in lines
    assert "tokenizer.kind" not in json.loads((tmp_path / "bpe/data/manifest.json").read_text())["settings"]


def test_a_prepared_set_refuses_another_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    """Catches ids of one tokenizer under another: asked for, swapped on disk, of two sets, of parts."""
    prepare(config, TOKENIZER, tmp_path / "set")
    one = DataConfig(source=DataSource.jsonl, paths=[str(tmp_path / "text/one")], workers=0)
    prepare(one, TokenizerConfig(vocab_size=390), tmp_path / "other")
    other_model = tmp_path / "other/tokenizer/tokenizer.model"
    prepared = DataConfig(source=DataSource.prepared, paths=[str(tmp_path / "set")])
    with pytest.raises(InputError, match=r"^data.paths: .*set was prepared with another .* anew with tokenizer.path="):
        load(prepared, TokenizerConfig(path=str(other_model)), tmp_path / "run")
    both = DataConfig(source=DataSource.prepared, paths=[str(tmp_path / "set"), str(tmp_path / "other")])
    with pytest.raises(InputError, match=r"data.paths: .*other was prepared with another tokenizer than .*set"):
        load(both, TOKENIZER, tmp_path / "run")
    settings = TokenizerConfig(path=str(tmp_path / "mine.model"))
    shutil.copy(tmp_path / "set/tokenizer/tokenizer.model", tmp_path / "mine.model")
    prepare(config, settings, tmp_path / "taken")
    shutil.copy(other_model, tmp_path / "mine.model")
    with pytest.raises(InputError, match=r"tokenizer.path=.*mine.model: is another tokenizer than .*taken was begun"):
        prepare(config, settings, tmp_path / "taken")
    shutil.copy(other_model, tmp_path / "set/tokenizer/tokenizer.model")
    with pytest.raises(InputError, match="is not the tokenizer that the token shards"):
        load(prepared, TOKENIZER, tmp_path / "run")


def test_sets_are_mixed_by_their_sources_names(config: DataConfig, tmp_path: Path) -> None:
    """Catches a set that hides another, and names that lead nowhere."""
    prepare(config, TOKENIZER, tmp_path / "set")
    model = str(tmp_path / "set/tokenizer/tokenizer.model")
    third = DataConfig(source=DataSource.jsonl, paths=[str(tmp_path / "text/one")], workers=0)
    prepare(third, TokenizerConfig(path=model), tmp_path / "third")
    both = DataConfig(source=DataSource.prepared, paths=[str(tmp_path / "set"), str(tmp_path / "third")])
    data = load(both, TOKENIZER, tmp_path / "run")
    assert sorted(data.train) == ["jsonl", "one", "two"] and data.domains == ["jsonl", "one", "two0", "two1"]
    assert (tmp_path / "run/tokenizer/tokenizer.model").read_bytes() == Path(model).read_bytes()
    weighted = dataclasses.replace(both, sources={"three": SourceConfig(weight=1)})
    with pytest.raises(InputError, match=r"data.sources.three: there is no such source .* there are jsonl, one, two"):
        load(weighted, TOKENIZER, tmp_path / "run")
    twice = dataclasses.replace(both, paths=[str(tmp_path / "set"), str(tmp_path / "set")])
    with pytest.raises(InputError, match="both have a source named 'one'"):
        load(twice, TOKENIZER, tmp_path / "run")


def test_a_set_is_not_chosen_from_anew(config: DataConfig, tmp_path: Path) -> None:
    """Catches options about the text that are ignored, as it was chosen before; the same ones again are no mistake, and
    a run that goes on is not stopped by them."""
    config = dataclasses.replace(config, on_bad_row=OnBadRow.skip)
    prepare(config, TOKENIZER, tmp_path / "set")
    of_set = DataConfig(source=DataSource.prepared, paths=[str(tmp_path / "set")], sequence_length=16)
    load(dataclasses.replace(of_set, on_bad_row=OnBadRow.skip), TokenizerConfig(), tmp_path / "same")
    for options in ({"text_field": "body"}, {"domain_field": "kind"}, {"split": "test"}, {"domains": ["a"]}):
        asked, (name, value) = dataclasses.replace(of_set, **options), *options.items()
        with pytest.raises(
            InputError, match=rf"^data.{name}=.*{value[0]}.*: the text of a prepared set was chosen when"
        ):
            load(asked, TokenizerConfig(), tmp_path / "run")
        load(asked, TokenizerConfig(), tmp_path / "run", keep_tokenizer=True)


@pytest.mark.parametrize("damage", ["flip", "truncate", "chunk", "missing", "starts"])
def test_damage_is_found_before_tokens_are_used(config: DataConfig, tmp_path: Path, damage: str) -> None:
    """Catches a flipped bit or a short file that is trained on."""
    prepare(config, TOKENIZER, tmp_path / "set")
    made = tmp_path / "set/data/one/00000-000"
    file = made.with_suffix({"chunk": ".json", "starts": ".train.starts.npy"}.get(damage, ".train.tokens.bin"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(raw[:-2] if damage == "truncate" else raw)
    with pytest.raises(InputError, match=str(file)):
        texts_of(load(config, TOKENIZER, tmp_path / "set"), "train")
    if damage != "flip":  # which is found when the tokens are read
        with pytest.raises(InputError, match=str(file)):
            prepare(config, TOKENIZER, tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("one/00000-000.json", "{", "bring it back, or delete its directory to prepare again"),
        ("one/00000-000.json", "[]", "bring it back, or delete its directory to prepare again"),
        ("manifest.json", "{", "delete its directory to prepare again"),
        ("manifest.json", "[]", "delete its directory to prepare again"),
        ("manifest.json", '{"format": 0}', "delete its directory to prepare again"),
    ],
)
def test_a_file_of_a_set_that_says_nothing_is_named(
    config: DataConfig, tmp_path: Path, name: str, text: str, words: str
) -> None:
    """Catches a traceback for a file of another version or program, and one that was cut short."""
    prepare(config, TOKENIZER, tmp_path / "set")
    file = tmp_path / "set/data" / name
    file.write_text(text)
    with pytest.raises(InputError, match=rf"^{file}: cannot be read \(.+\); {words}\.$"):
        prepare(config, TOKENIZER, tmp_path / "set")


def test_text_that_is_gone_is_said_of_a_set_that_is_complete(config: DataConfig, tmp_path: Path) -> None:
    """Catches a run that can not go on with its shards because what they were made of lies elsewhere now."""
    prepare(config, TOKENIZER, tmp_path / "set")
    (tmp_path / "text/one").rename(tmp_path / "moved")
    with pytest.raises(ChangedSourceError, match=r"^data.sources.one.paths: '.*/text/one' does not exist .*; bring"):
        prepare(config, TOKENIZER, tmp_path / "set")


def test_nothing_is_written_among_foreign_files(tmp_path: Path, config: DataConfig) -> None:
    """Catches a preparation into a directory whose `data` is somebody's, and may be removed with what it made."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"data/mine.txt: was not made by a preparation; write elsewhere"):
        prepare(config, TOKENIZER, tmp_path / "set")
    assert [path.name for path in (tmp_path / "set").rglob("*")] == ["data", "mine.txt"]


def test_text_of_one_character_is_too_little(tmp_path: Path) -> None:
    """Catches a set without anything to train on."""
    (tmp_path / "one.txt").write_text("a")
    write_tokenizer(tmp_path / "tokenizer")
    one = DataConfig(source=DataSource.text, paths=[str(tmp_path / "one.txt")], workers=0)
    with pytest.raises(InputError, match=r"^data.paths: all of its text is held out; give more text, or data"):
        prepare(one, TokenizerConfig(path=str(tmp_path / "tokenizer")), tmp_path / "set")
    with pytest.raises(InputError, match=r"^data.paths: there is no text to train on in it; give files with more"):
        prepare(one, TOKENIZER, tmp_path / "other")


def test_a_worker_that_dies_is_a_sentence(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a preparation that waits for ever for the result of a process that was killed."""
    prepare(config, TOKENIZER, tmp_path / "set")
    shutil.rmtree(tmp_path / "set/data")
    original = Encoder.submit

    def submit(self: Encoder, texts: list[str], form: None) -> object:
        future = original(self, texts, form)
        assert self._pool is not None
        for process in list(self._pool._processes.values()):
            process.kill()
        return future

    monkeypatch.setattr(Encoder, "submit", submit)
    with pytest.raises(RunError, match=r"a tokenizing process \(data.workers\) died"):
        prepare(dataclasses.replace(config, workers=1), TOKENIZER, tmp_path / "set")


def test_a_worker_that_can_not_start_is_a_sentence(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback where the system has no more processes, for the first worker or a later one."""
    original = multiprocessing.context.SpawnProcess.start
    for most in (0, 1):

        def start(process: Any, most: int = most) -> None:
            if len(multiprocessing.active_children()) >= most:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            original(process)

        monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start)
        with pytest.raises(RunError, match=r"data.workers: the system starts no more processes \(Resource temp"):
            prepare(dataclasses.replace(config, workers=2), TOKENIZER, tmp_path / "set")


def test_a_tokenizer_of_hugging_face_is_taken(config: DataConfig, tmp_path: Path) -> None:
    """Catches a set whose tokenizer can not be loaded again, with ids that need 32 bits."""
    tokenizers = pytest.importorskip("tokenizers")
    base = [chr(i) for i in range(32, 127)]
    vocabulary = {piece: index for index, piece in enumerate([*base, *(f"unused{i}" for i in range(70_000)), "</s>"])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.decoder = tokenizers.decoders.Fuse()
    (tmp_path / "hf").mkdir()
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "hf/tokenizer.json"))
    (tmp_path / "hf/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    wanted = TokenizerConfig(path=str(tmp_path / "hf"))
    prepare(config, wanted, tmp_path / "set")
    data = load(config, wanted, tmp_path / "set")
    assert data.tokenizer.vocab_size > 70_000 and data.train["one"][0].tokens.dtype == np.uint32
    assert any(text.startswith("one 0 1: lines of text") for text in texts_of(data, "train"))


def test_one_document_of_ten_megabytes(tmp_path: Path) -> None:
    """Catches a document that is cut, doubled or refused because of its size."""
    words = [f"word{index} " for index in range(997)]
    text = "".join(words[index * index % 997] for index in range(1_400_000))
    (tmp_path / "long.txt").write_text(text)
    assert len(text) > 10_000_000
    long = DataConfig(source=DataSource.text, paths=[str(tmp_path / "long.txt")], workers=0)
    prepare(long, TOKENIZER, tmp_path / "set")
    data = load(long, TOKENIZER, tmp_path / "set")
    train, validation = texts_of(data, "train"), texts_of(data, "validation")
    assert len(train) == len(validation) == 1 and train[0] + validation[0] == text


def test_skipped_rows_are_counted_once(config: DataConfig, tmp_path: Path, small_chunks: None) -> None:
    """Catches counts that include what the tokenizer's training or the choice of the split passed over."""
    file = tmp_path / "text/one/0.jsonl"
    lines = file.read_text().splitlines()
    lines[3:3] = ["{", '{"text": null}', '{"text": ""}', '{"text": 5}']
    file.write_text("\n".join([*lines, '{"text": "cut']))
    (tmp_path / "nothing").mkdir()
    config.sources["one"].paths.append(str(tmp_path / "nothing"))
    prepare(dataclasses.replace(config, on_bad_row=OnBadRow.skip), TOKENIZER, tmp_path / "set")
    manifest = json.loads((tmp_path / "set/data/manifest.json").read_text())
    assert manifest["skipped"] == {
        "broken_json": 1,
        "empty_text": 1,
        "no_match": 1,
        "null_text": 1,
        "truncated_tail": 1,
        "wrong_type": 1,
    }


def test_a_stream_prepares_only_what_it_is_validated_on(config: DataConfig, tmp_path: Path) -> None:
    """Catches shards of a whole stream, or a stream without validation."""
    for source in config.sources.values():
        source.weight = 1.0
        source.domain_field = None
    streaming = dataclasses.replace(config, streaming=True)
    prepare(streaming, TOKENIZER, tmp_path / "set")
    data = load(streaming, TOKENIZER, tmp_path / "set")
    assert not any(data.train.values()) and len(texts_of(data, "validation")) > 5
    assert sorted(data.splits) == ["one", "two"] and data.domains == ["one", "two"]
