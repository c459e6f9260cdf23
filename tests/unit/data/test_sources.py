"""Catches: documents that are lost, changed, read twice or out of order; a position that another reading cannot use."""

import errno
import glob
import gzip
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from moe_lm.data.config import DataConfig, DataSource, SourceConfig
from moe_lm.data.documents import Document
from moe_lm.data.sources import Beginning, Source, beginning_of, open_sources, open_validation, stdlib_files
from moe_lm.errors import InputError

TEXTS = [f"row {i} \u2028 é 👩\r\n" + "x" * (i % 5) for i in range(23)]
KINDS = ("text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "arrow stream", "hub", "saved", "saved splits")


def write(directory: Path, kind: str) -> Path:
    """The texts as files of a kind, in two files where a kind has files; returns what `data.paths` names."""
    directory.mkdir(parents=True)
    halves = (TEXTS[:11], TEXTS[11:])
    for index, texts in enumerate(halves):
        path = directory / f"{index}.{kind.split()[0]}"
        table = pyarrow.table(
            {
                "n": list(range(len(texts))),
                "text": texts,
                "lang": ["en", "ko"] * (len(texts) // 2) + ["en"] * (len(texts) % 2),
            }
        )
        if kind == "text":
            for number, text in enumerate(texts):
                (directory / f"{11 * index + number:02}.txt").write_bytes(text.encode())
        elif kind.startswith("jsonl"):
            lines = [json.dumps(row, ensure_ascii=row["n"] % 2 == 0) for row in table.to_pylist()]
            content = ("\n".join(lines[:5]) + "\n\n" + "\r\n".join(lines[5:]) + ("\n" if index else "")).encode()
            if kind == "jsonl.zst":
                with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
                    file.write(content)
            else:
                path.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
        elif kind in ("parquet", "hub"):
            parquet.write_table(table, directory / f"{index}.parquet", row_group_size=4)
        elif kind.startswith("arrow"):
            new = pyarrow.ipc.new_stream if kind.endswith("stream") else pyarrow.ipc.new_file
            with new(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
    if kind.startswith("saved"):
        data = datasets.Dataset.from_dict({"text": TEXTS, "lang": ["en", "ko"] * 11 + ["en"]})
        (data if kind == "saved" else datasets.DatasetDict({"train": data})).save_to_disk(str(directory))
    return directory


def source_of(kind: str, path: Path, **values: object) -> Source:
    name = "huggingface" if kind in ("hub", "saved", "saved splits") else kind.split(".")[0].split()[0]
    return open_sources(DataConfig(source=DataSource[name], paths=[str(path)], **values))[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of every kind."""
    base = tmp_path_factory.mktemp("sources")
    return {kind: write(base / kind.replace(" ", "_"), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_come_whole_and_in_order(kind: str, places: dict[str, Path]) -> None:
    source = source_of(kind, places[kind])
    documents = [document for document, _ in source.read()]
    assert [document.text for document in documents] == TEXTS
    assert len({document.name for document in documents}) == len(TEXTS)
    assert {document.domain for document in documents} == {source.name}
    assert not any("/" in document.name for document in documents)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_behind_any_document(kind: str, places: dict[str, Path]) -> None:
    """Catches a row that is repeated or passed over when reading begins in the middle of a file, a row group or a
    compressed stream; positions go through JSON, as in a checkpoint."""
    whole = list(source_of(kind, places[kind]).read())
    for index, (_, position) in enumerate(whole):
        again = [document for document, _ in source_of(kind, places[kind]).read(json.loads(json.dumps(position)))]
        assert again == [document for document, _ in whole[index + 1 :]], index


def test_reading_of_a_long_hub_data_set_goes_on(tmp_path: Path) -> None:
    """Catches states that are asked of `datasets` now and then, and the rows between two of them."""
    texts = [f"row {i}" for i in range(700)]
    for part in range(2):
        table = pyarrow.table({"text": texts[350 * part : 350 * part + 350]})
        parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=90)
    whole = list(source_of("hub", tmp_path).read())
    assert [document.text for document, _ in whole] == texts
    for index in (0, 89, 254, 255, 256, 257, 349, 350, 511, 512, 698, 699):
        again = source_of("hub", tmp_path).read(json.loads(json.dumps(whole[index][1])))
        assert [document.text for document, _ in again] == texts[index + 1 :], index


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "text"])
def test_domains_are_read_from_a_field(kind: str, places: dict[str, Path]) -> None:
    found = [d.domain for d, _ in source_of(kind, places[kind], domain_field="lang").read()]
    assert set(found) == {"en", "ko"} and found[:2] == ["en", "ko"]


def test_sources_of_a_mixture_have_their_own_kind_fields_and_domain(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "from a", "lang": "xx"}\n')
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "c.jsonl").write_text('{"text": "from c", "lang": "yy"}\n')
    sources = {
        "c": SourceConfig(paths=[str(tmp_path / "c.jsonl")]),
        "b": SourceConfig(source=DataSource.text, paths=[str(tmp_path / "b.txt")], domain="prose"),
        "a": SourceConfig(paths=[str(tmp_path / "a.jsonl")], text_field="body", domain="own"),
    }
    opened = open_sources(DataConfig(source=DataSource.jsonl, sources=sources, domain_field="lang"))
    assert [source.name for source in opened] == ["a", "b", "c"]
    documents = [document for source in opened for document, _ in source.read()]
    assert [(d.text, d.domain) for d in documents] == [("from a", "own"), ("from b", "prose"), ("from c", "yy")]


def test_empty_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": ""}\n')
    source = source_of("jsonl", tmp_path)
    assert [document.text for document, _ in source.read()] == ["x"]
    assert source.bad.skipped == {"empty_text": 2}


def test_a_part_of_the_files_can_be_read(places: dict[str, Path]) -> None:
    """Catches units that overlap."""
    source = source_of("jsonl", places["jsonl"])
    first = [document for document, _ in source.read([0, None], stop=1)]
    second = [document for document, _ in source.read([1, None], stop=2)]
    assert [document.text for document in first + second] == TEXTS and len(first) == 11


def test_the_beginning_of_a_source(places: dict[str, Path]) -> None:
    source = beginning_of(source_of("jsonl", places["jsonl"]), 60)
    assert isinstance(source, Beginning) and 1 < len(source.documents) < 10
    whole = list(source.read())
    assert [document.text for document, _ in whole] == TEXTS[: len(whole)]
    assert list(source.read(whole[0][1])) == whole[1:]


def test_files_directories_and_globs_name_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/.hidden/d.txt"):
        (tmp_path / name).write_text(f"{name}\r\nsecond line\n", newline="")
    paths = [str(path) for path in (tmp_path, tmp_path / "*.txt", tmp_path / "a.txt", tmp_path / "**" / "*.md")]
    source = open_sources(DataConfig(source=DataSource.text, paths=paths))[0]
    documents = [document for document, _ in source.read()]
    assert [document.name for document in documents] == ["a.txt", "b.txt", "sub/c.md"]
    assert documents[0] == Document("a.txt", "a.txt\r\nsecond line\n", "text")


def test_what_is_neither_file_nor_directory_is_said(tmp_path: Path) -> None:
    """Catches "does not exist" of a pipe that stands there."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"data.paths: '.*/pipe' is neither a file nor a directory"):
        open_sources(DataConfig(source=DataSource.text, paths=[str(tmp_path / "pipe")]))


def test_a_directory_that_can_not_be_listed_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches text that is passed over without a word; what is hidden would not be read anyway."""
    for name in ("text/open", "text/closed", "text/.closed"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("some text")
    original = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)  # as root nothing is forbidden
    config = DataConfig(source=DataSource.text, paths=[str(tmp_path / "text")])
    with pytest.raises(InputError, match=r"data.paths: .*/text/closed can not be listed \(Permission denied\)"):
        open_sources(config)
    config.paths = [str(tmp_path / "text/open")]
    assert len(open_sources(config)[0].files) == 1


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet", "arrow"])
def test_a_file_that_goes_while_it_is_read_is_a_sentence(kind: str, tmp_path: Path) -> None:
    """Catches a traceback, hours into a stream, for text that somebody has moved away."""
    source = source_of(kind, write(tmp_path / "text", kind))
    gone = source.files[-1].path
    gone.unlink()
    with pytest.raises(InputError, match=f"^data.paths: {gone} cannot be read .*No such file or directory"):
        list(source.read())


def test_a_link_keeps_the_ending_that_says_its_format(tmp_path: Path) -> None:
    """Catches the Hub's cache, whose files are links to blobs without an ending; and a file read twice through one."""
    (tmp_path / "blob").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    (tmp_path / "set").mkdir()
    for name in ("b.jsonl.gz", "a.jsonl.gz"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "blob")
    assert list(source_of("jsonl", tmp_path / "set").read()) == [(Document("a.jsonl.gz:1", "x", "jsonl"), [0, [14, 1]])]
    values = {"paths": [str(tmp_path / "set")], "validation_paths": [str(tmp_path / "blob")]}
    config = DataConfig(source=DataSource.jsonl, **values)
    with pytest.raises(InputError, match="there is no text left"):
        open_sources(config, without=open_validation(config))


def test_the_files_behind_a_hub_directory_are_sorted(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stream that another machine takes for changed, because its directories list in another order."""
    expected = source_of("hub", places["hub"]).watched
    listed = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *args, **values: listed(*args, **values)[::-1])
    assert source_of("hub", places["hub"]).watched == expected == sorted(expected) and len(expected) == 2


def test_only_one_hub_data_set_can_be_validated_on(places: dict[str, Path]) -> None:
    hub = str(places["hub"])
    config = DataConfig(source=DataSource.huggingface, paths=[hub], validation_paths=[hub, hub])
    with pytest.raises(InputError, match=r"data.validation_paths=.*: give one name or directory"):
        open_validation(config)


def test_files_that_are_validated_on_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    config = DataConfig(source=DataSource.text, paths=[str(tmp_path)], validation_paths=[str(tmp_path / "b.txt")])
    validation = open_validation(config)
    assert validation is not None and [d.text for d, _ in validation.read()] == ["b.txt"]
    (source,) = open_sources(config, without=validation)
    assert [d.text for d, _ in source.read()] == ["a.txt", "c.txt"]
    only = DataConfig(source=DataSource.text, paths=[str(tmp_path / "b.txt")], validation_paths=config.validation_paths)
    with pytest.raises(InputError, match=r"data.paths=.*there is no text left"):
        open_sources(only, without=open_validation(only))


def test_standard_library_is_whole_sorted_and_without_tests() -> None:
    source = open_sources(DataConfig())[0]
    names = [file.name for file in source.files]
    assert len(names) > 300 and names == sorted(names)
    assert not {"test", "tests", "site-packages"} & {part for name in names for part in name.split("/")}
    root = Path(sysconfig.get_path("stdlib"))
    for _, (document, _) in zip(range(30), source.read()):
        assert document.text.encode() == (root / document.name).read_bytes()


def test_standard_library_leaves_out_what_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "case.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    source = open_sources(DataConfig())[0]
    assert [document for document, _ in source.read()] == [Document("good.py", "x = 1\n", "stdlib")]
    assert source.bad.skipped == {"invalid_utf8": 1}


def test_a_python_without_sources_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.source=stdlib: this Python has no .py files"):
        stdlib_files(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "valid"}, r"data.split=valid: .* can not be opened so"),
        ({"text_field": "body"}, r"data.text_field=body: .* has no such column \(its columns: lang, n, text\)"),
        ({"subset": "nope"}, r"data.subset=nope, data.split=train: .* can not be opened so"),
        ({"revision": "v1"}, r"data.revision=v1: .* is a directory, which has no revisions; leave it out"),
    ],
)
def test_wrong_options_of_a_hub_data_set_are_sentences(
    places: dict[str, Path], options: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        list(source_of("hub", places["hub"], **options).read())


def test_a_missing_split_of_a_saved_data_set_names_those_there(places: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"data.split=test: .* has the splits train"):
        list(source_of("saved splits", places["saved splits"], split="test").read())


@pytest.mark.parametrize("saved_as", [None, "valid"])
def test_another_split_than_the_saved_one_is_refused(tmp_path: Path, saved_as: str | None) -> None:
    """Catches training on the one split that is there, whichever was asked for."""
    split = None if saved_as is None else datasets.NamedSplit(saved_as)
    datasets.Dataset.from_dict({"text": TEXTS}, split=split).save_to_disk(str(tmp_path))
    assert len(list(source_of("saved", tmp_path).read())) == len(TEXTS)
    with pytest.raises(InputError, match=rf"data.split=test: .* is one split, saved as {saved_as}; leave data.split"):
        list(source_of("saved", tmp_path, split="test").read())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa".encode())
    (source,) = open_sources(DataConfig(source=DataSource.text, paths=[str(tmp_path)]))
    assert [document.text for document, _ in source.read()] == ["a"]


def test_a_parquet_file_that_is_read_as_arrow_is_called_so(places: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"0.parquet: is a Parquet file; read it as parquet"):
        list(open_sources(DataConfig(source=DataSource.arrow, paths=[str(places["parquet"] / "0.parquet")]))[0].read())


def test_a_data_set_of_the_hub_is_opened_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is replaced: no hub can be reached from a test."""
    asked = []

    def load(path: str, subset: str | None, *, split: str, revision: str | None, streaming: bool) -> object:
        asked.append((path, subset, split, revision, streaming))
        return datasets.Dataset.from_list([{"text": "a"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    own = SourceConfig(paths=["some/set"], revision="abc", weight=1.0)
    inherits = SourceConfig(paths=["other/set"], subset="en", weight=1.0)
    config = DataConfig(source=DataSource.huggingface, sources={"own": own, "other": inherits}, revision="v1")
    for source in open_sources(config):
        assert [document.text for document, _ in source.read()] == ["a"]
    assert asked == [("other/set", "en", "train", "v1", True), ("some/set", None, "train", "abc", True)]


def test_subsets_of_one_data_set_are_sources_of_their_own(tmp_path: Path) -> None:
    """Catches two languages of one data set that are taken for the same text, and the same text that is not."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def source(subset: str) -> SourceConfig:
        return SourceConfig(paths=[str(tmp_path)], subset=subset, weight=1.0)

    config = DataConfig(source=DataSource.huggingface, sources={"en": source("en"), "de": source("de")})
    assert [opened.name for opened in open_sources(config)] == ["de", "en"]
    config.sources["de"] = source("en")
    with pytest.raises(InputError, match=r"data.sources.en.paths: .* is in data.sources.de.paths too"):
        open_sources(config)
