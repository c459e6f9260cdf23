"""The tokenizer's part of the gate: each fault of its files that a text, an answer or a chat would show is found."""

import json
from pathlib import Path

import pytest

from moe_lm.data.chat_template import DEFAULT_TEMPLATE
from moe_lm.data.config import TokenizerKind
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer, train_tokenizer
from moe_lm.hf.receipt import VerificationError
from moe_lm.hf.tokenizer_parity import check_tokenizer
from tests.models import write_tokenizer

TEMPLATE, CONFIG, TOKENIZER = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SentencePieceTokenizer:
    """A sentencepiece model of this file's text."""
    return train_tokenizer([Path(__file__).read_text() * 3], 450, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def by_character(tmp_path_factory) -> SentencePieceTokenizer:
    """The same, by character."""
    text, directory = Path(__file__).read_text(), tmp_path_factory.mktemp("character")
    return train_tokenizer([text], 450, directory, kind=TokenizerKind.character)


@pytest.fixture
def chat(trained, tmp_path, monkeypatch) -> tuple[SentencePieceTokenizer, Path]:
    """A tokenizer with a chat template, and its files for transformers."""
    monkeypatch.setattr(trained, "chat_template", DEFAULT_TEMPLATE)
    trained.save(tmp_path, 64)
    return trained, tmp_path


def _changed(name: str, change):
    def fault(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return fault


def _without_mark(content) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|assistant|>"]
    content["model"]["vocab"]["<|other|>"] = content["model"]["vocab"].pop("<|assistant|>")


def _other_begin(content) -> None:
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [2]


FAULTS = {
    "garbage": (
        lambda d: (d / TEMPLATE).write_text("garbage"),
        "a conversation of 1 messages by the chat template is ",
    ),
    "syntax": (lambda d: (d / TEMPLATE).write_text("{% for %}"), "transformers can not apply the chat template"),
    "deleted": (lambda d: (d / TEMPLATE).unlink(), "transformers can not apply the chat template"),
    "end": (
        lambda d: (d / TEMPLATE).write_text(DEFAULT_TEMPLATE.replace(" + eos_token", "")),
        "a conversation of 2 messages by the chat template is ",
    ),
    "prompt": (
        lambda d: (d / TEMPLATE).write_text(DEFAULT_TEMPLATE.replace("if add_generation_prompt", "if false")),
        "a conversation of 1 messages by the chat template is ",
    ),
    "begin": (_changed(TOKENIZER, lambda c: c.update(post_processor=None)), "a text with the mark of its begin is "),
    "other_begin": (_changed(TOKENIZER, _other_begin), "a text with the mark of its begin is "),
    "no_decoder": (_changed(TOKENIZER, lambda c: c.update(decoder=None)), "in training, and '"),
    "bytes": (_changed(TOKENIZER, lambda c: c["decoder"]["decoders"].pop(1)), "in training, and '<0x"),
    "mark": (_changed(TOKENIZER, _without_mark), "the control string '<|assistant|>' is "),
    "split": (
        _changed(CONFIG, lambda c: c.update(split_special_tokens=True)),
        "a conversation of 1 messages by the chat template is ",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_the_files_is_found(chat, case):
    """Catches a check of plain texts alone, which a chat without a template, an answer that can not be decoded, or a
    prompt without its begin passes.
    """
    tokenizer, directory = chat
    fault, words = FAULTS[case]
    fault(directory)
    with pytest.raises(VerificationError) as caught:
        check_tokenizer(directory, tokenizer)
    assert words in str(caught.value)


def test_a_template_that_training_does_not_know_is_found(chat, monkeypatch):
    """Catches a directory that got the template of another model."""
    tokenizer, directory = chat
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(VerificationError, match="transformers has a chat template, and training none"):
        check_tokenizer(directory, tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ bos_token }}hello", "leaves out what is said"), ("{{ raise_exception('no') }}", "takes none of .*no")],
)
def test_a_template_that_both_read_and_that_says_nothing_is_found(chat, template, words):
    """Catches a hand check that compares a damaged file with itself."""
    _, directory = chat
    (directory / TEMPLATE).write_text(template)
    with pytest.raises(VerificationError, match=words):
        check_tokenizer(directory, load_tokenizer(directory))


def test_good_files_are_good(chat, by_character, tmp_path, monkeypatch):
    """Catches a check that refuses what is right, and a receipt that does not say what was compared: with a template,
    without one, with one that refuses some conversations, and of other kinds of tokenizer.
    """
    tokenizer, directory = chat
    finding = check_tokenizer(directory, tokenizer).finding
    assert "ids of 8 conversations by the chat template" in finding and "; the begin mark in front of" in finding
    assert f"; {len(tokenizer.control_strings)} control strings;" in finding
    picky = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + DEFAULT_TEMPLATE
    for template, said in ((picky, "ids of 4 conversations"), (None, "no chat template")):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        tokenizer.save(directory, 64)
        assert said in check_tokenizer(directory, tokenizer).finding
    monkeypatch.setattr(by_character, "chat_template", DEFAULT_TEMPLATE)
    by_character.save(tmp_path / "character", 64)
    assert "ids of 8 conversations" in check_tokenizer(tmp_path / "character", by_character).finding
    other = write_tokenizer(tmp_path / "other")
    assert "; no begin mark in front of a text; no chat" in check_tokenizer(tmp_path / "other", other).finding
