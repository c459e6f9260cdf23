"""Catches: documents lost, changed or read twice; a split that leaks or moves; input errors without a place."""

import json
import sysconfig
from pathlib import Path

import pytest
from moe_lm.data.corpus import Document, read_documents, read_stdlib, split_documents

from moe_lm.data.config import DataConfig, DataSource
from moe_lm.errors import InputError


def text_config(*paths: Path | str, **values: object) -> DataConfig:
    return DataConfig(source=DataSource.text, paths=[str(path) for path in paths], **values)  # type: ignore[arg-type]


def jsonl_config(*paths: Path | str, **values: object) -> DataConfig:
    return DataConfig(source=DataSource.jsonl, paths=[str(path) for path in paths], **values)  # type: ignore[arg-type]


def test_standard_library_is_whole_sorted_and_without_tests() -> None:
    corpus = read_documents(DataConfig())
    names = [document.name for document in corpus.train]
    assert len(corpus.train) + len(corpus.validation) > 300
    assert names == sorted(names)
    assert not {"test", "tests", "site-packages"} & {part for name in names for part in name.split("/")}
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.12
    assert not {document.name for document in corpus.validation} & set(names)
    root = Path(sysconfig.get_path("stdlib"))
    for document in corpus.train[:30]:
        assert document.text.encode() == (root / document.name).read_bytes()
    assert read_documents(DataConfig()).fingerprint == corpus.fingerprint


def test_standard_library_skips_and_counts_what_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "case.py").write_text("x = 1\n")
    documents, skipped = read_stdlib(tmp_path)
    assert documents == [Document("good.py", "x = 1\n")]
    assert skipped == 1


def test_a_python_without_sources_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.source=stdlib: this Python has no .py files"):
        read_stdlib(tmp_path)


def test_fingerprint_changes_with_content_name_and_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n" * 20)
    first = read_documents(text_config(tmp_path)).fingerprint
    assert read_documents(text_config(tmp_path)).fingerprint == first
    assert read_documents(text_config(tmp_path, validation_fraction=0.2)).fingerprint != first
    (tmp_path / "a.txt").write_text("one\ntwo\nthreE\n" * 20)
    changed = read_documents(text_config(tmp_path)).fingerprint
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, changed, read_documents(text_config(tmp_path)).fingerprint}) == 3


def test_fingerprint_does_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        (tmp_path / place).mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            (tmp_path / place / name).write_text(f"{name}\n" * 30)
    here, there = (read_documents(text_config(tmp_path / place)) for place in ("here", "there/deeper"))
    assert here.fingerprint == there.fingerprint


def test_a_document_keeps_its_side_when_others_come() -> None:
    documents = [Document(f"{index}.txt", "text") for index in range(400)]
    train, validation, _ = split_documents(documents, 0.05)
    assert 8 <= len(validation) <= 36
    assert len(train) + len(validation) == 400
    fewer_train, fewer_validation, _ = split_documents(documents[::2], 0.05)
    assert set(fewer_train) <= set(train)
    assert set(fewer_validation) <= set(validation)


@pytest.mark.parametrize("text", ["line one\nline two\n" * 50, "no newline at all " * 50, "ab", "\r\n" * 30, "x\n" * 3])
def test_few_documents_hold_out_their_tails_without_loss(text: str) -> None:
    train, validation, words = split_documents([Document("only.txt", text)], 0.05)
    assert train[0].text + validation[0].text == text
    assert train[0].text
    assert validation[0].text
    assert validation[0].name == "only.txt (tail)"
    assert "last 0.05" in words
    if text.count("\n") > 40:
        assert train[0].text.endswith("\n")
        assert 0.03 < len(validation[0].text) / len(text) < 0.1


def test_a_single_character_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"data.validation_fraction=0.05: 1 characters are too few"):
        split_documents([Document("only.txt", "x")], 0.05)


def test_files_directories_and_globs_name_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/.hidden/d.txt"):
        (tmp_path / name).write_text(f"{name}\r\nsecond line\n")
    corpus = read_documents(text_config(tmp_path, tmp_path / "*.txt", tmp_path / "a.txt", tmp_path / "**" / "*.md"))
    assert [document.name for document in corpus.train] == ["a.txt", "b.txt", "sub/c.md"]
    assert corpus.train[0].text + corpus.validation[0].text == "a.txt\r\nsecond line\n"


def test_validation_paths_hold_out_exactly_those(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    corpus = read_documents(text_config(tmp_path, validation_paths=[str(tmp_path / "b.txt")]))
    assert [document.text for document in corpus.train] == ["a.txt", "c.txt"]
    assert [document.text for document in corpus.validation] == ["b.txt"]
    with pytest.raises(InputError, match=r"data.paths=.*no text left"):
        read_documents(text_config(tmp_path / "b.txt", validation_paths=[str(tmp_path / "b.txt")]))


def test_text_errors_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    cases = {
        "absent.txt": "data.paths: '.*absent.txt' does not exist",
        "*.csv": r"data.paths: '.*\*.csv' matches no file",
        "nothing": "data.paths: the directory '.*nothing' holds no",
        "latin.txt": r"data.paths: .*latin.txt is not UTF-8 text \(byte 3\)",
        "empty.txt": "data.paths=.*all files are empty",
    }
    for path, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            read_documents(text_config(tmp_path / path))
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(InputError, match=r"data.validation_paths: .*latin.txt is not UTF-8"):
        read_documents(text_config(tmp_path / "good.txt", validation_paths=[str(tmp_path / "latin.txt")]))


def test_jsonl_lines_are_documents(tmp_path: Path) -> None:
    texts = ["plain", "with\nnewline", "separator \u2028 inside", "nul \x00", "emoji 👩‍👩‍👧", ""] * 20
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=index % 2 == 0) for index, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:7]) + "\n\n" + "\r\n".join(lines[7:]), newline="")
    (tmp_path / "ignored.txt").write_text("not JSON")
    corpus = read_documents(jsonl_config(tmp_path))
    found = {document.name: document.text for document in [*corpus.train, *corpus.validation]}
    assert sorted(found.values()) == sorted(text for text in texts if text)
    assert found["a.jsonl:2"] == "with\nnewline"
    assert found["a.jsonl:9"] == texts[7]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "cut', "not valid JSON"),
        ("[1]", "a JSON object is needed, found list"),
        ('{"body": "x", "id": 1}', r"no field 'text' \(its fields: body, id\); set data.text_field"),
        ('{"text": null}', "must be a string, found NoneType"),
        ('{"text": 5}', "must be a string, found int"),
        ('{"text": "a\\ud800"}', "holds a lone surrogate at character 1"),
        ('{"text": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"data.paths: .*rows.jsonl, line 2: .*" + sentence):
        read_documents(jsonl_config(tmp_path / "rows.jsonl"))


def test_public_text_is_read_whole(outside_data: Path) -> None:
    corpus = read_documents(text_config(outside_data / "tinyshakespeare.txt"))
    whole = corpus.train[0].text + corpus.validation[0].text
    assert whole.encode() == (outside_data / "tinyshakespeare.txt").read_bytes()
    assert 0.049 < len(corpus.validation[0].text) / len(whole) < 0.051
    korean = read_documents(jsonl_config(outside_data / "tldr-ko.jsonl"))
    assert len(korean.train) > 10 * len(korean.validation) > 0
