"""Catches: text that does not come back, control ids out of text, ids that differ between runs or in transformers."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.data.config import TokenizerKind
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.data.tokenizer_export import save_tokenizer_files
from moe_lm.data.tokenizer_files import SPACE
from moe_lm.data.tokenizer_sentencepiece import (
    CHUNK_CHARACTERS,
    CONTROL_SYMBOLS,
    SentencePieceTokenizer,
    train_tokenizer,
    training_chunks,
)
from moe_lm.errors import InputError

HARD_PIECES = [
    *(" ", "  ", "    ", "\n", "\r\n", "\t", "\x00", "\x7f", "\x85", "\u00a0", "\u2028", "\ufeff", "\u200d", "\ufffd"),
    *("<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<|user|>", "<|spare_0|>", "<|end|>"),
    *("a", "aa", "é", "e\u0301", "한국어", "ф", "👩‍👩‍👧", "𝔘", "\U0010ffff", "\u2047", "\u2585", "\ue000"),
    *(
        "0",
        "00",
        "self.",
        "__init__",
        "(self",
        "):\n",
        "return ",
        "-",
        "--",
        "=",
        "#",
        "*",
        "def f(x):\n    return x\n",
    ),
]

hard_text = st.lists(st.sampled_from(HARD_PIECES) | st.text(max_size=4), max_size=40).map("".join)


def hard_strings() -> list[str]:
    """Some 1,400 strings on which tokenizers tend to differ: runs, mixtures and every pair of hard pieces."""
    generator = random.Random(0)
    runs = [piece * count for piece in HARD_PIECES for count in (1, 2, 3, 7, 16, 33, 100)]
    pairs = ["".join(pair) for pair in itertools.product(HARD_PIECES[::2], repeat=2)]
    mixtures = ["".join(generator.choices(HARD_PIECES, k=generator.randint(3, 60))) for _ in range(700)]
    return ["", *runs, *pairs, *mixtures]


@pytest.fixture(scope="session")
def by_character(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A tokenizer by character, trained on the sample and some hard text."""
    texts = [*sample_texts, "".join(HARD_PIECES[::2])]
    return train_tokenizer(texts, 1500, tmp_path_factory.mktemp("character"), kind=TokenizerKind.character)


@pytest.fixture(scope="session", params=TokenizerKind, ids=lambda kind: kind.name)
def each_tokenizer(
    request: pytest.FixtureRequest, tokenizer: SentencePieceTokenizer, by_character: SentencePieceTokenizer
) -> SentencePieceTokenizer:
    """One of each kind."""
    return tokenizer if request.param is TokenizerKind.bpe else by_character


@settings(deadline=None, max_examples=300)
@given(text=hard_text)
def test_any_text_comes_back(each_tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = each_tokenizer.encode(text)
    assert each_tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert not any(each_tokenizer.is_control(token) or each_tokenizer.is_unknown(token) for token in ids)


def test_each_character_is_one_token(by_character: SentencePieceTokenizer, sample_texts: list[str]) -> None:
    """Catches pieces of several characters, and rare characters that sentencepiece leaves to bytes by default."""
    for text in sample_texts:
        assert [by_character.decode([token]) for token in by_character.encode(text)] == list(text)
    found = {*"".join(sample_texts), *"".join(HARD_PIECES[::2])} - {"\t", "\0", "\u2585"}  # bytes: sentencepiece's own
    assert {by_character.piece(token) for token in by_character.text_ids} == {SPACE, *found} - {" "}
    assert by_character.vocab_size == 256 + 4 + len(CONTROL_SYMBOLS) + len(found)


def test_characters_that_there_is_no_room_for_are_bytes(tmp_path: Path) -> None:
    """Catches text that is lost or refused, and room that the rarest characters take."""
    hangul = [chr(code) for code in range(0xAC00, 0xAC00 + 3000)]
    text = "".join(hangul[:50] * 2 + hangul[50:])
    tokenizer = train_tokenizer([text], 400, tmp_path, kind=TokenizerKind.character)
    assert tokenizer.vocab_size == 400 and tokenizer.decode(tokenizer.encode(text)) == text
    assert all(len(tokenizer.encode(character)) == 1 for character in hangul[:50])
    assert len(tokenizer.encode(hangul[-1])) == 3


def test_control_symbols_have_ids_of_their_own(tokenizer: SentencePieceTokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    ids = {tokenizer.token_id(symbol) for symbol in CONTROL_SYMBOLS}
    assert len(ids) == 5 + 32
    assert all(tokenizer.is_control(token) for token in ids)
    with pytest.raises(KeyError):
        tokenizer.token_id("<|nobody|>")


def test_indentation_and_line_ends_have_pieces(tokenizer: SentencePieceTokenizer) -> None:
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    assert "\u2581" * 8 in pieces
    assert "):\n" in pieces
    assert max(map(len, pieces)) <= 24


def test_batches_encode_as_single_texts_do(tokenizer: SentencePieceTokenizer) -> None:
    texts = hard_strings()[:200]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_training_twice_gives_the_same_model(
    tokenizer: SentencePieceTokenizer, sample_texts: list[str], tmp_path: Path
) -> None:
    again = train_tokenizer(sample_texts, tokenizer.vocab_size, tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert train_tokenizer(sample_texts, 1400, tmp_path).fingerprint != tokenizer.fingerprint


def test_training_prints_nothing(sample_texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(sample_texts[:1], 600, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_hard_text_can_be_trained_on(tmp_path: Path) -> None:
    texts = [text for text in hard_strings() if text] * 3
    tokenizer = train_tokenizer(texts, 450, tmp_path)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts[:500])


def test_marks_of_sentencepiece_do_not_lose_the_text_around_them(tmp_path: Path) -> None:
    """Catches a whole chunk that nothing is learned from, for one character in it."""
    text = "the same words again and again, to be learned whole\n" * 60
    plain = train_tokenizer([text], 385, tmp_path / "plain")
    marked = train_tokenizer([f"{text}\t\u2585"], 385, tmp_path / "marked")
    assert marked.encode(text) == plain.encode(text)


@pytest.mark.parametrize("wanted", [50_000, 30_000, 10_000, 4_001])
def test_more_text_than_wanted_is_thinned_evenly(wanted: int) -> None:
    """Catches a beginning that is taken for the whole, and text that is kept beyond what was asked for."""
    texts = [f"{number:06} " * 6_000 for number in range(5)]
    chunks = training_chunks(iter(texts), wanted)
    every = [text[i : i + CHUNK_CHARACTERS] for text in texts for i in range(0, len(text), CHUNK_CHARACTERS)]
    stride = round(len(every) / len(chunks))
    assert chunks in [every[:: 2**power] for power in range(8)] and stride > 1
    assert wanted / 2 - CHUNK_CHARACTERS < sum(map(len, chunks)) <= wanted
    assert "".join(training_chunks(texts, 250_000)) == "".join(texts)


def test_a_directory_or_a_file_can_be_loaded(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, 100)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"tokenizer.path: '.*empty' holds neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path / "empty")


def test_vocabulary_too_large_for_the_text_names_the_largest(tmp_path: Path) -> None:
    texts = ["".join(f"to be {number} or not to be {number * 7}, that is the question\n" for number in range(100))]
    with pytest.raises(InputError, match=r"tokenizer.vocab_size=4096: .* the largest that works is (\d+)") as caught:
        train_tokenizer(texts, 4096, tmp_path)
    largest = int(str(caught.value).rstrip(".").split()[-1])
    assert train_tokenizer(texts, largest, tmp_path).vocab_size == largest


@pytest.mark.parametrize("text", ["x", " ", "\t\t", "\n\n", "\x00", "to be or not to be"])
def test_text_too_small_for_any_tokenizer_is_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"tokenizer.vocab_size=4096: .* too few different words for any tokenizer"):
        train_tokenizer([text], 4096, tmp_path)


def test_vocabulary_too_small_for_the_characters_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.vocab_size=400: .* too many different characters"):
        train_tokenizer(["".join(map(chr, range(0xAC00, 0xAC00 + 3000))) * 2], 400, tmp_path)


def test_files_that_are_no_tokenizer_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "noise.model").write_bytes(b"not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"tokenizer.path: '.*absent.model' cannot be read"):
        load_tokenizer(tmp_path / "absent.model")
    for name in ("noise", "empty"):
        with pytest.raises(InputError, match=f"tokenizer.path: '.*{name}.model' is not a sentencepiece"):
            load_tokenizer(tmp_path / f"{name}.model")
    (tmp_path / "noise.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(
        InputError, match=r"^'.*tokenizer.model' is not a sentencepiece .* good copy, or fetch it again"
    ):
        load_tokenizer(tmp_path)  # of a model's directory, whose command has no such option


def test_transformers_gives_the_same_ids_and_text(
    each_tokenizer: SentencePieceTokenizer, sample_texts: list[str], tmp_path: Path
) -> None:
    transformers, tokenizer = pytest.importorskip("transformers"), each_tokenizer
    save_tokenizer_files(tokenizer, tmp_path, model_max_length=10_000)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    slices = [text[start : start + 500] for text in sample_texts for start in range(0, len(text), 5000)]
    for text in [*hard_strings(), *slices]:
        ids = tokenizer.encode(text)
        assert other(text, add_special_tokens=False).input_ids == ids, text
        assert other.decode(ids) == text
        assert other(text).input_ids == [tokenizer.bos_id, *ids]
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id, other.unk_token_id) == (1, 2, 3, 0)
    assert other.model_max_length == 10_000
    assert len(other) == tokenizer.vocab_size
    assert other.decode([1, *tokenizer.encode("text"), 2], skip_special_tokens=True) == "text"
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.model_bytes


@settings(deadline=None, max_examples=200)
@given(text=hard_text)
def test_transformers_agrees_on_any_text(fast_tokenizer: tuple[SentencePieceTokenizer, object], text: str) -> None:
    tokenizer, other = fast_tokenizer
    assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def fast_tokenizer(
    each_tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentencePieceTokenizer, object]:
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("exported")
    save_tokenizer_files(each_tokenizer, directory, model_max_length=10_000)
    return each_tokenizer, transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_type": "unigram", "byte_fallback": True}, "not plain BPE"),
        ({"model_type": "bpe", "byte_fallback": False}, "no byte fallback"),
        ({"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nfkc"}, "changes the text"),
        ({"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<x>"]}, "not plain BPE"),
    ],
)
def test_models_that_cannot_be_exported_exactly_are_refused(
    sample_texts: list[str], tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts[0].splitlines()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=600,
        **settings,
    )
    with pytest.raises(InputError, match=f"tokenizer.path: this sentencepiece model .*{sentence}"):
        save_tokenizer_files(SentencePieceTokenizer(tmp_path / "m.model"), tmp_path / "out", 100)


@pytest.mark.parametrize("mark", ["bos_id", "eos_id"])
def test_a_model_without_marks_of_a_document_is_refused(tmp_path: Path, mark: str) -> None:
    """Catches documents that run into each other, or an id of -1."""
    options = {"model_prefix": str(tmp_path / "m"), "vocab_size": 7, "minloglevel": 2, mark: -1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c"] * 9), **options)
    with pytest.raises(InputError, match=r"^tokenizer.path: '.*' has no <s> or </s> .*; use another tokenizer.$"):
        load_tokenizer(tmp_path / "m.model")


def test_a_model_with_a_dummy_prefix_and_no_padding_is_exported_exactly(
    sample_texts: list[str], tmp_path: Path
) -> None:
    """The kind that Mixtral ships."""
    transformers = pytest.importorskip("transformers")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts[0].splitlines()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    assert tokenizer.pad_id == tokenizer.eos_id
    save_tokenizer_files(tokenizer, tmp_path / "out", 10_000)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in hard_strings():
        ids = tokenizer.encode(text)
        assert other(text, add_special_tokens=False).input_ids == ids
        assert other.decode(ids) == tokenizer.decode(ids) == text


def test_hard_text_of_other_languages(
    outside_data: Path, fast_tokenizer: tuple[SentencePieceTokenizer, object]
) -> None:
    tokenizer, other = fast_tokenizer
    for name in ("tldr-ko.jsonl", "tldr-ru.jsonl", "tldr-es.jsonl"):
        for line in (outside_data / name).read_text(encoding="utf-8").splitlines()[:150]:
            text = json.loads(line)["text"]
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert other.encode(text, add_special_tokens=False) == ids  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", TokenizerKind)
@pytest.mark.parametrize("spaces", [0, 3])
def test_a_text_with_few_spaces_or_none(spaces, kind, tmp_path):
    """Catches a space without a piece of its own, which is spelt in bytes of U+2581 and comes back as that."""
    text = " ".join(["".join(chr(0x4E00 + (i * i) % 200) for i in range(20_000))] * (1 + spaces))
    tokenizer = train_tokenizer([text], 560, tmp_path, kind=kind)
    for sample in ("a b  c", " ", text[:300]):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.is_by_character is (kind is TokenizerKind.character)
