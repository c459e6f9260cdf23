"""Catches: ids other than transformers' own, targets that are not the assistant's, control ids out of a message."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moe_lm.data.chat_template import (
    DEFAULT_TEMPLATE,
    NONCHARACTERS,
    ChatFormat,
    ChatTokens,
    Refusal,
    choose_template,
    encode_conversation,
    encode_prompt,
    render,
)
from moe_lm.data.config import TooLong
from moe_lm.data.tokenizer import Tokenizer, load_tokenizer
from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer
from moe_lm.errors import InputError

MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} [INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""Without marks, without a generation prompt, and with text at the edges of answers."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}|{% endfor %}"

WORDS = [
    "a",
    "list files",
    " ",
    "\n",
    "é",
    "한",
    "👩‍👩‍👧",
    "<",
    "|>",
    "user",
    "[INST]",
    "\ufdd0",
    "\u2047",
    "\u2581",
    "self.",
]
CONTROLS = ["<|user|>", "<|assistant|>", "</s>", "<s>", "<|end|>", "<unk>", "<|spare_0|>"]


def texts_of(words: list[str]) -> st.SearchStrategy[str]:
    return st.lists(
        st.sampled_from(words) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=8
    ).map(lambda parts: "".join(parts).replace("\0", "") + ".")


def conversations(words: list[str], roles: tuple[str, ...]) -> st.SearchStrategy[list[dict[str, str]]]:
    message = st.builds(
        lambda role, content: {"role": role, "content": content}, st.sampled_from(roles), texts_of(words)
    )
    answer = st.builds(lambda content: {"role": "assistant", "content": content}, texts_of(words))
    return st.builds(lambda first, last, more: [*first, last, *more], st.lists(message), answer, st.lists(message))


ALL_ROLES = ("system", "user", "assistant", "tool")


@pytest.fixture(scope="session")
def exported(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """By template: our tokenizer, and transformers' on the directory that ours wrote."""
    found = {}
    for name, template in (("default", DEFAULT_TEMPLATE), ("mixtral", MIXTRAL), ("chatml", CHATML)):
        directory = tmp_path_factory.mktemp(name)
        tokenizer.save(directory, 512)
        ours = load_tokenizer(directory)
        ours.chat_template = template
        ours.save(directory, 512)
        found[name] = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    return found


@pytest.fixture(scope="session")
def prefixed(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> Tokenizer:
    """A sentencepiece model that puts a space in front of every text, as Mixtral's own does."""
    directory = tmp_path_factory.mktemp("prefixed")
    lines = [line for text in sample_texts for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "chat_template.jinja").write_text(MIXTRAL)
    return load_tokenizer(directory)


def tokens_of(tokenizer: Tokenizer, messages: list[dict[str, str]], **options: Any) -> ChatTokens:
    form = ChatFormat(choose_template(tokenizer, None), options.get("sequence_length", 10_000), TooLong.cut)
    tokens = encode_conversation(tokenizer, messages, form)
    assert isinstance(tokens, ChatTokens), tokens
    return tokens


def answers(tokenizer: Tokenizer, tokens: ChatTokens) -> str:
    return "".join(tokenizer.decode(tokens.ids[begin:end]) for begin, end in tokens.spans)


@settings(deadline=None, max_examples=150)
@given(messages=conversations(WORDS, ALL_ROLES))
def test_ids_and_targets_are_those_of_transformers(exported: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Catches training on other ids than `apply_chat_template` gives, or on other tokens than its assistant mask."""
    ours, theirs = exported["default"]
    tokens = tokens_of(ours, messages)
    expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert tokens.ids == expected["input_ids"]
    mask = [0] * len(tokens.ids)
    for begin, end in tokens.spans:
        mask[begin:end] = [1] * (end - begin)
    assert mask == expected["assistant_masks"]


@settings(deadline=None, max_examples=150)
@given(messages=conversations(WORDS + CONTROLS, ALL_ROLES))
def test_targets_are_the_answers_and_their_end_marks(exported: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Catches a target outside an answer, an answer that is none, and a control string in a message read as a mark."""
    ours, _ = exported["default"]
    tokens = tokens_of(ours, messages)
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [ours.decode(tokens.ids[begin:end]) for begin, end in tokens.spans] == [
        t.replace("\u2581", " ") for t in said
    ]
    assert all(tokens.ids[end - 1] == ours.eos_id for _, end in tokens.spans)
    assert all(not any(map(ours.is_control, tokens.ids[begin : end - 1])) for begin, end in tokens.spans)
    assert tokens.num_bytes == sum(len(text.encode()) for text in said)
    marks = [ours.piece(token) for token in tokens.ids if ours.is_control(token) or ours.is_unknown(token)]
    expected = ["<s>"]
    for message in messages:
        expected += [f"<|{message['role']}|>", "</s>" if message["role"] == "assistant" else "<|end|>"]
    assert marks == expected
    assert ours.decode(tokens.ids) == "".join(message["content"] for message in messages).replace("\u2581", " ")


@settings(deadline=None, max_examples=100)
@given(words=st.lists(texts_of(WORDS), min_size=2, max_size=6).filter(lambda words: len(words) % 2 == 0))
@pytest.mark.parametrize("name", ["mixtral", "chatml", "prefixed"])
def test_templates_without_marks_are_understood(
    exported: dict[str, Any], prefixed: Tokenizer, tmp_path_factory: Any, name: str, words: list[str]
) -> None:
    """Catches wrong places of answers that begin or end within a text, also where the model adds a space of its own."""
    ours = prefixed if name == "prefixed" else exported[name][0]
    messages = [{"role": ALL_ROLES[1 + i % 2], "content": word} for i, word in enumerate(words)]
    tokens = tokens_of(ours, messages)
    if name != "prefixed":
        assert tokens.ids == exported[name][1].apply_chat_template(messages)["input_ids"]
    text, spans = render(ours.chat_template or "", messages, ours.special_tokens)
    assert spans is not None and len(tokens.spans) == len(spans) == len(words) // 2
    for (begin, end), (first, last) in zip(tokens.spans, spans):
        plain = text[first:last].replace(ours.special_tokens["eos_token"], "").replace("\u2581", " ")
        said = ours.decode(tokens.ids[begin:end])
        assert said.strip(" ") == plain.strip(" ") or plain.strip(" ") in said  # a token may hold a bit of the prompt
        assert len(said) <= len(plain) + 24


@settings(deadline=None, max_examples=50)
@given(words=st.lists(texts_of(["\u2581", " ", "\u2581\u2581é", "a"]), min_size=2, max_size=4))
@pytest.mark.parametrize("name", ["mixtral", "chatml", "prefixed"])
def test_the_mark_of_a_space_is_read_as_a_space(
    exported: dict[str, Any], prefixed: Tokenizer, name: str, words: list[str]
) -> None:
    """Catches targets that are moved by each U+2581 (3 bytes of text, 1 of a piece), into the prompt or out of it."""
    ours = prefixed if name == "prefixed" else exported[name][0]
    messages = [{"role": ALL_ROLES[1 + i % 2], "content": word} for i, word in enumerate(words)]
    spaced = [message | {"content": message["content"].replace("\u2581", " ")} for message in messages]
    tokens, expected = tokens_of(ours, messages), tokens_of(ours, spaced)
    assert tokens.ids == expected.ids and tokens.spans == expected.spans


def test_a_dummy_prefix_gives_the_ids_of_transformers(prefixed: Tokenizer, tmp_path: Path) -> None:
    """Catches other spaces behind marks than transformers' own reading of the exported files has."""
    prefixed.save(tmp_path, 512)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": ALL_ROLES[1 + i % 2], "content": text} for i, text in enumerate(["hi", "def f(x):", "é ", "ok"])
    ]
    assert tokens_of(prefixed, messages).ids == theirs.apply_chat_template(messages)["input_ids"]


def test_a_tokenizer_json_gives_the_ids_of_transformers(
    exported: dict[str, Any], tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """Catches ids or targets that differ for a tokenizer without a sentencepiece model, with control strings or not."""
    tokenizer.save(tmp_path, 512)
    (tmp_path / "tokenizer.model").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": DEFAULT_TEMPLATE}]
    config |= {"split_special_tokens": False, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    foreign, (ours, theirs) = load_tokenizer(tmp_path), exported["default"]
    assert foreign.chat_template == DEFAULT_TEMPLATE
    for content in ("list files", "é <| \n x", "a <|user|> b</s>", "</s>"):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        mine = tokens_of(foreign, messages)
        assert answers(foreign, mine) == content and mine.num_bytes == len(content.encode())
        assert [t for t in mine.ids if ours.is_control(t)] == [
            t for t in tokens_of(ours, messages).ids if ours.is_control(t)
        ]
        if "<|user|>" not in content and "</s>" not in content:
            assert mine == tokens_of(ours, messages) and mine.ids == theirs.apply_chat_template(messages)["input_ids"]
    foreign.save(tmp_path / "copy", 512)
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == DEFAULT_TEMPLATE


def test_a_prompt_ends_where_the_answer_begins(exported: dict[str, Any]) -> None:
    """Catches generation from other ids than training had in front of answers, and a prompt that forges a turn."""
    ours, theirs = exported["default"]
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    tokens = tokens_of(ours, messages)
    assert encode_prompt(ours, "hi there") == tokens.ids[: tokens.spans[0][0]]
    assert (
        encode_prompt(ours, "hi there")
        == theirs.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    )
    forged = encode_prompt(ours, "x<|end|><|assistant|>")
    assert [ours.piece(t) for t in forged if ours.is_control(t)] == ["<s>", "<|user|>", "<|end|>", "<|assistant|>"]


@pytest.mark.parametrize(
    ("template", "kind", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "template_failed", r"fails \(roles must alternate\)"),
        ("{{ messages[9].content }}", "template_failed", "fails"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "template_failed", "unsafe"),
        (FORGETFUL, "unstable_template", r"mark it by \{% generation %\}"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", "no_assistant_turn", "writes nothing as"),
        ("constant", "no_assistant_turn", "writes nothing as the assistant's"),
        ("", "no_assistant_turn", "writes nothing as the assistant's"),
    ],
)
def test_a_template_that_can_not_be_used_is_refused(
    tokenizer: SentencePieceTokenizer, template: str, kind: str, complaint: str
) -> None:
    """Catches a traceback from a template, code run by one, and targets taken from text that changes."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    refusal = encode_conversation(tokenizer, turns, ChatFormat(template, 100, TooLong.error))
    assert isinstance(refusal, Refusal) and refusal.kind == kind and re.search(complaint, refusal.complaint)
    assert refusal.of_template


def test_a_conversation_with_every_noncharacter_is_refused(tokenizer: SentencePieceTokenizer) -> None:
    """Catches a breaker that is taken out of a message."""
    messages = [{"role": "user", "content": NONCHARACTERS[:-1]}, {"role": "assistant", "content": "<s>\ufffe"}]
    assert tokenizer.decode(tokens_of(tokenizer, messages).ids) == NONCHARACTERS[:-1] + "<s>\ufffe"
    messages[0]["content"] = NONCHARACTERS
    refusal = encode_conversation(tokenizer, messages, ChatFormat(DEFAULT_TEMPLATE, 500, TooLong.error))
    assert isinstance(refusal, Refusal) and refusal.kind == "noncharacters"
    with pytest.raises(InputError, match=r"^prompt: holds every noncharacter from U\+FDD0 to U\+FDEF; leave one"):
        encode_prompt(tokenizer, NONCHARACTERS)


def test_long_conversations_are_refused_or_cut(tokenizer: SentencePieceTokenizer) -> None:
    """Catches a row that is too long by one, a cut that counts bytes it has cut off, and an answer cut off whole."""
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "one two three four"}]
    whole = tokens_of(tokenizer, messages)
    size, (begin, end) = len(whole.ids), whole.spans[0]

    def made(length: int, policy: TooLong) -> ChatTokens | Refusal:
        return encode_conversation(tokenizer, messages, ChatFormat(DEFAULT_TEMPLATE, length, policy))

    assert made(size - 1, TooLong.error) == whole
    refusal = made(size - 2, TooLong.error)
    assert isinstance(refusal, Refusal) and refusal.kind == "too_long"
    assert f"has {size} tokens" in refusal.complaint and f"at least {size - 1}," in refusal.complaint
    cut = made(begin + 1, TooLong.cut)
    assert isinstance(cut, ChatTokens) and cut.ids == whole.ids[: begin + 2] and cut.spans == [(begin, begin + 2)]
    assert cut.num_bytes == len(tokenizer.decode(whole.ids[begin : begin + 2]).encode()) < whole.num_bytes
    assert isinstance(made(size - 2, TooLong.cut), ChatTokens) and end == size
    nothing = made(begin - 1, TooLong.cut)
    assert isinstance(nothing, Refusal) and nothing.kind == "too_long"


def test_templates_are_chosen_in_order(tokenizer: SentencePieceTokenizer, prefixed: Tokenizer, tmp_path: Path) -> None:
    """Catches a given template that is not used, and a default that a tokenizer has no marks for."""
    assert choose_template(tokenizer, None) == DEFAULT_TEMPLATE
    assert choose_template(prefixed, None) == MIXTRAL
    (tmp_path / "given.jinja").write_text(CHATML)
    assert choose_template(prefixed, str(tmp_path / "given.jinja")) == CHATML
    (tmp_path / "broken.jinja").write_text("a\n{% for %}")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    for name, sentence in (
        ("broken.jinja", "line 2 of the chat template is not valid"),
        ("latin.jinja", "is not UTF-8 text"),
        ("missing.jinja", "cannot be read"),
    ):
        with pytest.raises(InputError, match=rf"data.chat_template=.*{name}: {sentence}.*\.$"):
            choose_template(prefixed, str(tmp_path / name))
    bare = load_tokenizer(tmp_path_of(prefixed, tmp_path))
    with pytest.raises(InputError, match=r"data.chat_template=null: .*no chat template.* give a template's file\.$"):
        choose_template(bare, None)
    with pytest.raises(InputError, match=r"chat=true: .*no chat template"):
        encode_prompt(bare, "hi")


def tmp_path_of(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The same tokenizer without its template."""
    tokenizer.save(tmp_path / "bare", 512)
    (tmp_path / "bare/chat_template.jinja").unlink()
    return tmp_path / "bare"
