"""Every kind of bad row: with `error` a sentence with its place, with `skip` counted, and all good rows still given."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from moe_lm.data.config import DataConfig, DataSource, OnBadRow
from moe_lm.data.sources import open_sources
from moe_lm.errors import InputError

GOOD = b'{"text": "good"}\n'


def line(content: bytes) -> Callable[[Path], None]:
    """A bad line between two good ones."""
    return lambda directory: (directory / "a.jsonl").write_bytes(GOOD + content + b"\n" + GOOD) and None


def compressed(kind: str) -> Callable[[Path], None]:
    """Good rows, cut within text that does not compress."""

    def write(directory: Path) -> None:
        content = GOOD * 2 + json.dumps({"text": os.urandom(200_000).hex()}).encode() + b"\n"
        path = directory / f"a.jsonl.{kind}"
        if kind == "gz":
            path.write_bytes(gzip.compress(content))
        else:
            with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
                file.write(content)
        path.write_bytes(path.read_bytes()[:-50_000])

    return write


def table(columns: dict[str, Any], kind: str = "parquet", cut: int = 0) -> Callable[[Path], None]:
    """A columnar file of four-row groups, cut short by so many bytes."""

    def write(directory: Path) -> None:
        content, path = pyarrow.table(columns), directory / f"a.{kind}"
        if kind == "parquet":
            parquet.write_table(content, path, row_group_size=4)
        else:
            with pyarrow.ipc.new_stream(str(path), content.schema) as writer:
                writer.write_table(content, max_chunksize=2)
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])

    return write


def overwritten(kind: str, start: bytes, content: bytes) -> Callable[[Path], None]:
    """A columnar file with bytes written over it from where `start` stands."""

    def write(directory: Path) -> None:
        table({"text": [f"good{i}" for i in range(12)]}, kind)(directory)
        path = directory / f"a.{kind}"
        place = path.read_bytes().index(start)
        path.write_bytes(path.read_bytes()[:place] + content + path.read_bytes()[place + len(content) :])

    return write


def invalid_strings() -> pyarrow.Array:
    """A column of strings, one of which is not UTF-8."""
    raw = pyarrow.array([b"good", b"caf\xe9", b"good"], type=pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())


def nothing(directory: Path) -> None:
    (directory / "other.csv").write_text("a,b\n")


CASES = {
    "broken_json": (line(b'{"text": '), "a.jsonl, line 2: not valid JSON", 2),
    "broken_json deep": (line(b"[" * 100_000), "a.jsonl, line 2: not valid JSON", 2),
    "truncated_tail": (
        lambda d: (d / "a.jsonl").write_bytes(GOOD + GOOD[:-4]),
        "a.jsonl, line 2: the file ends within this line",
        1,
    ),
    "missing_field": (line(b'{"body": "x", "id": 1}'), r"line 2: no field 'text' \(its fields: body, id\)", 2),
    "wrong_type": (line(b'{"text": 5}'), "line 2: the field 'text' must be a string, found int", 2),
    "wrong_type row": (line(b"[1]"), "line 2: a JSON object is needed, found list", 2),
    "null_text": (line(b'{"text": null}'), "line 2: the field 'text' is null", 2),
    "invalid_utf8": (line(b'{"text": "caf\xe9"}'), r"line 2: is not UTF-8 text \(byte 13 of the line\)", 2),
    "nul": (line(b'{"text": "a\\u0000"}'), "line 2: the field 'text' holds a NUL at character 1", 2),
    "nul raw": (line(b'{"text": "a\0"}'), "line 2: holds a NUL at byte 11 of the line", 2),
    "lone_surrogate": (line(b'{"text": "a\\ud800"}'), "line 2: the field 'text' holds a lone surrogate", 2),
    "truncated_file gz": (compressed("gz"), "a.jsonl.gz, line 3: the file is cut short here", 2),
    "truncated_file zst": (compressed("zst"), "a.jsonl.zst, line 3: the file is cut short here", 2),
    "damaged_file gz": (
        lambda d: (d / "a.jsonl.gz").write_bytes(b"no gzip at all"),
        "a.jsonl.gz, line 1: the file can not be read further",
        0,
    ),
    "empty_file": (lambda d: (d / "a.jsonl").write_bytes(b""), "a.jsonl: the file holds no row", 0),
    "empty_file blank": (lambda d: (d / "a.jsonl").write_bytes(b"\n \r\n"), "a.jsonl: the file holds no row", 0),
    "empty_file text": (lambda d: (d / "a.txt").write_bytes(b""), "a.txt: the file is empty", 0),
    "invalid_utf8 text": (lambda d: (d / "a.txt").write_bytes(b"caf\xe9"), r"a.txt: is not UTF-8 text \(byte 3\)", 0),
    "nul text": (lambda d: (d / "a.txt").write_bytes(b"a\0b"), "a.txt: the text holds a NUL at character 1", 0),
    "missing_field parquet": (table({"body": ["x"]}), r"a.parquet: no column 'text' \(its columns: body\)", 0),
    "wrong_type parquet": (table({"text": [1] * 6}), "a.parquet, row group 0, row 0: .*found int", 0),
    "null_text parquet": (
        table({"text": ["good"] * 5 + [None, "good"]}),
        "a.parquet, row group 1, row 1: the field 'text' is null",
        6,
    ),
    "invalid_utf8 parquet": (
        table({"text": invalid_strings()}),
        "a.parquet, row group 0, row 1: the field 'text' is not UTF-8 text",
        2,
    ),
    "damaged_file parquet": (table({"text": ["good"] * 9}, cut=30), "a.parquet: the file can not be read", 0),
    "truncated_file arrow": (table({"text": ["good"] * 6}, "arrow", cut=40), "a.arrow.*: the file ", None),
    "null_text arrow": (table({"text": ["good", "good", None]}, "arrow"), "a.arrow, row 2: .* is null", 2),
    "empty_file parquet": (lambda d: (d / "a.parquet").write_bytes(b""), "a.parquet: the file is empty", 0),
    "empty_file arrow": (lambda d: (d / "a.arrow").write_bytes(b""), "a.arrow: the file is empty", 0),
    "empty_file rows parquet": (table({"text": []}), "a.parquet: the file holds no row", 0),
    "missing_field twice parquet": (
        lambda d: parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), d / "a.parquet"),
        "a.parquet: several columns 'text'",
        0,
    ),
    "damaged_file group parquet": (
        overwritten("parquet", b"good4", b"\xff" * 40),
        "a.parquet, row group 1, row 0: the file ",
        8,
    ),
    "damaged_file offsets arrow": (
        overwritten("arrow", bytes([5, 0, 0, 0, 10, 0, 0, 0]), b"\xff\xff\xff\x7f"),
        "a.arrow: the file can not be read further",
        0,
    ),
    "no_match": (nothing, "the directory '.*': holds no .jsonl or .jsonl.gz or .jsonl.zst file", 0),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_rows(case: str, tmp_path: Path) -> None:
    write, sentence, num_good = CASES[case]
    kind = next((k for k in ("text", "parquet", "arrow") if case.endswith(f" {k}")), "jsonl")
    (tmp_path / "bad").mkdir()
    write(tmp_path / "bad")
    (tmp_path / "good").mkdir()
    {
        "text": lambda: (tmp_path / "good/z.txt").write_text("good"),
        "jsonl": lambda: (tmp_path / "good/z.jsonl").write_bytes(GOOD),
        "parquet": lambda: table({"text": ["good"]})(tmp_path / "good"),
        "arrow": lambda: table({"text": ["good"]}, "arrow")(tmp_path / "good"),
    }[kind]()
    paths = [str(tmp_path / "bad"), str(tmp_path / "good")]
    config = DataConfig(source=DataSource[kind], paths=paths)
    with pytest.raises(InputError, match=sentence) as caught:
        list(open_sources(config)[0].read())
    said = str(caught.value)
    assert said.startswith("data.paths: ") and "\n" not in said and said.count("data.on_bad_row=skip") == 1
    config.on_bad_row = OnBadRow.skip
    (source,) = open_sources(config)
    texts = [document.text for document, _ in source.read()]
    assert {text.rstrip("0123456789") for text in texts} == {"good"}
    assert num_good is None or len(texts) == num_good + 1
    expected = case.split()[0]
    counts = {"wrong_type": 6} if case == "wrong_type parquet" else {expected: 1}
    if case == "truncated_file arrow":  # the format's reader says either
        assert sum(source.bad.skipped.values()) == 1 and len(texts) >= 3
    else:
        assert source.bad.skipped == counts


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_reading_goes_on_in_a_file_that_is_cut_short(kind: str, tmp_path: Path) -> None:
    """Catches rows in front of the cut that come or not, depending on where reading began."""
    rows = b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n" for _ in range(5000))
    content = gzip.compress(rows) if kind == "gz" else pyarrow.compress(rows, "zstd", asbytes=True)
    (tmp_path / f"a.jsonl.{kind}").write_bytes(content[: -len(content) // 4])
    config = DataConfig(source=DataSource.jsonl, paths=[str(tmp_path)], on_bad_row=OnBadRow.skip)
    (source,) = open_sources(config)
    whole = list(source.read())
    assert len(whole) > (3600 if kind == "gz" else 2000)  # zstd can only read whole blocks
    for index in (*range(0, len(whole), 500), *range(len(whole) - 60, len(whole), 7)):
        assert list(source.read(whole[index][1])) == whole[index + 1 :], index


def test_a_domain_that_a_stream_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "lang": "en"}\n{"text": "b", "lang": "xx"}\n{"text": "c"}\n')
    values = {"domain_field": "lang", "domains": ["en"], "streaming": True}
    config = DataConfig(source=DataSource.jsonl, paths=[str(tmp_path)], **values)
    with pytest.raises(InputError, match=r"a.jsonl, line 2: 'lang' is 'xx', which is not among data.domains"):
        list(open_sources(config)[0].read())
    config.on_bad_row = OnBadRow.skip
    (source,) = open_sources(config)
    assert [document.text for document, _ in source.read()] == ["a"]
    assert source.bad.skipped == {"unknown_domain": 1, "missing_field": 1}


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    config = DataConfig(source=DataSource.jsonl, paths=[str(tmp_path / "*.jsonl")])
    with pytest.raises(InputError, match=r"data.paths: '.*\*.jsonl': matches no file"):
        open_sources(config)
    config.on_bad_row = OnBadRow.skip
    with pytest.raises(InputError, match="there is no text left to read"):
        open_sources(config)
