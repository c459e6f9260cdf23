"""Catches: a split that leaks, moves or loses text."""

import pytest

from moe_lm.data.config import OnBadRow
from moe_lm.data.documents import BadRows, Document, Split, SplitWay, choose_split
from moe_lm.errors import InputError


def both_sides(split: Split, documents: list[Document]) -> tuple[list[Document], list[Document]]:
    sides = [split.sides(document) for document in documents]
    return [train for train, _ in sides if train], [held_out for _, held_out in sides if held_out]


def test_a_document_keeps_its_side_when_others_come() -> None:
    documents = [Document(f"{index}.txt", "text") for index in range(400)]
    split = choose_split(documents, 0.05)
    train, held_out = both_sides(split, documents)
    assert 8 <= len(held_out) <= 36 and len(train) + len(held_out) == 400
    fewer = choose_split(documents[::2], 0.05)
    assert split == fewer and str(split) == "one document in 20 by the SHA-256 of its name"
    assert set(both_sides(fewer, documents[::2])[1]) <= set(held_out)


def test_the_first_documents_decide_the_way() -> None:
    """Catches a source of terabytes that is read to its end to be split, and a hash that holds nothing out."""
    documents = [Document(f"{index}.txt", "text") for index in range(100_000)]
    read = iter(documents)
    assert choose_split(read, 0.05).way is SplitWay.hash
    assert len(list(read)) > 99_000
    by_hash = Split(SplitWay.hash, 0.05)
    unlucky = [document for document in documents if by_hash.sides(document)[0]]
    assert choose_split(unlucky[:30], 0.05).way is SplitWay.tail
    assert choose_split(documents[:19], 0.05).way is SplitWay.tail


@pytest.mark.parametrize("text", ["line one\nline two\n" * 50, "no newline at all " * 50, "ab", "\r\n" * 30, "x\n" * 3])
def test_few_documents_hold_out_their_tails_without_loss(text: str) -> None:
    split = choose_split([Document("only.txt", text)], 0.05)
    train, held_out = split.sides(Document("only.txt", text, "prose"))
    assert train is not None and held_out is not None and train.text + held_out.text == text
    assert train.text and held_out.text and train.domain == held_out.domain == "prose"
    assert held_out.name == "only.txt (tail)" and "last 0.05" in str(split)
    if text.count("\n") > 40:
        assert train.text.endswith("\n") and 0.03 < len(held_out.text) / len(text) < 0.1


def test_of_one_long_text_the_end_is_held_out() -> None:
    """Catches a split that is not the usual one of a text: its first nine tenths, and the rest, but for part of a
    line."""
    text = "".join(f"line {number}\n" for number in range(10_000))
    split = choose_split([Document("only.txt", text)], 0.1)
    train, held_out = split.sides(Document("only.txt", text))
    assert train is not None and held_out is not None and train.text + held_out.text == text
    assert 0 <= len(held_out.text) - len(text) / 10 < 12 and train.text.endswith("\n")


@pytest.mark.parametrize("title", ["Title\n", "\n", "a\nb\n"])
def test_a_title_above_one_long_line_does_not_hold_all_out(title: str) -> None:
    """Catches a cut at the only line's end there is, which leaves nothing but the title to train on."""
    text = title + "word " * 10_000
    train, held_out = Split(SplitWay.tail, 0.05).sides(Document("only.txt", text))
    assert train is not None and held_out is not None and train.text + held_out.text == text
    assert len(held_out.text) == round(len(text) * 0.05)


def test_all_or_nothing() -> None:
    document = Document("a", "text")
    assert Split(SplitWay.train_all, 0.05).sides(document) == (document, None)
    assert Split(SplitWay.hold_out_all, 0.05).sides(document) == (None, document)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((None, "null_text"), (5, "wrong_type"), (["a"], "wrong_type"), (b"a", "wrong_type"), ("a\0", "nul")),
        *(("a\ud800", "lone_surrogate"), (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "why"), "invalid_utf8")),
    ],
)
def test_values_that_are_no_text(value: object, kind: str) -> None:
    bad = BadRows(OnBadRow.skip)
    assert not bad.accept(value, "rows.jsonl, line 3") and bad.skipped == {kind: 1}
    with pytest.raises(InputError, match=r"^data.paths: rows.jsonl, line 3: the text .*or set data.on_bad_row=skip"):
        BadRows(OnBadRow.error, "data.paths").accept(value, "rows.jsonl, line 3")


@pytest.mark.parametrize("value", ["", "text", "é\u2028\ufeff", "<s> </s>", "\x01"])
def test_values_that_are_text(value: str) -> None:
    assert BadRows(OnBadRow.error).accept(value, "here")
