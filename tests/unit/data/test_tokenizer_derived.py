"""A base's sentencepiece model beside a tokenizer.json: which of the two is the tokenizer.

Chat derivatives leave the base's tokenizer.model as it is, and have `<|im_start|>`, `<|im_end|>` and another end mark
in the files beside it only.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from moe_lm.data.chat_template import ChatFormat, ChatTokens, encode_conversation
from moe_lm.data.config import TooLong
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.data.tokenizer_huggingface import HuggingFaceTokenizer
from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer
from moe_lm.errors import InputError
from moe_lm.hf.tokenizer_parity import check_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "what is  a node?"},
    {"role": "assistant", "content": " a class\n"},
    {"role": "user", "content": "and <|x|>?"},
    {"role": "assistant", "content": "text"},
]


@pytest.fixture(scope="module")
def base(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with a dummy prefix and without padding, as Mixtral's, in transformers' layout."""
    directory = tmp_path_factory.mktemp("base")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in sample_texts[0].splitlines() if line.strip()),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    load_tokenizer(directory / "tokenizer.model").save(directory / "base", 512)
    return directory / "base"


def derive(base: Path, directory: Path, tokens: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy with added tokens, and with changes of tokenizer_config.json."""
    load_tokenizer(base).save(directory, 512)
    (directory / "special_tokens_map.json").unlink()
    content = json.loads((directory / "tokenizer.json").read_text())
    like = content["added_tokens"][0]
    content["added_tokens"] += [like | {"id": 400 + number, "content": text} for number, text in enumerate(tokens)]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    values = json.loads((directory / "tokenizer_config.json").read_text()) | {"split_special_tokens": False} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


@pytest.fixture
def chat(base: Path, tmp_path: Path) -> Path:
    """A chat derivative, of a class that does not read tokenizer.json as it stands."""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "eos_token": "<|im_end|>", "chat_template": CHATML}
    return derive(base, tmp_path / "chat", ("<|im_end|>", "<|im_start|>"), **config)


def test_added_tokens_and_the_end_mark_are_those_of_transformers(chat: Path) -> None:
    """Catches a chat mark that is spelled out in letters, and the end mark of the base."""
    ours, theirs = load_tokenizer(chat), AutoTokenizer.from_pretrained(chat)
    assert ours.vocab_size == len(theirs) == 402
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 400)
    tokens = encode_conversation(ours, MESSAGES, ChatFormat(CHATML, 512, TooLong.error))
    assert isinstance(tokens, ChatTokens)
    assert tokens.ids == theirs.apply_chat_template(MESSAGES)["input_ids"]
    assert tokens.ids.count(400) == tokens.ids.count(401) == 4
    assert all(400 in tokens.ids[begin:end] for begin, end in tokens.spans) and len(tokens.spans) == 2


def test_a_derivative_is_saved_whole(chat: Path, tmp_path: Path) -> None:
    """Catches an export without the added tokens or the sentencepiece model, and one that transformers reads in another
    way than training did: its LlamaTokenizer takes no dummy prefix in front of a space."""
    ours = load_tokenizer(chat)
    ours.save(tmp_path / "copy", 512)
    assert (tmp_path / "copy/tokenizer.model").read_bytes() == (chat / "tokenizer.model").read_bytes()
    again, theirs = load_tokenizer(tmp_path / "copy"), AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert again.fingerprint == ours.fingerprint and again.chat_template == CHATML
    for text in (" a", "  a b", "def f(x):\n    return x", "<|im_start|>", "a</s>b", "é한"):
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert again.encode(text) == ours.encode(text) == ids and not {1, 2, 400, 401} & set(ids)
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").eos_token == "<|im_end|>"


def test_a_text_ends_where_the_template_closes_an_answer(chat: Path, base: Path) -> None:
    """Catches an answer that runs on: behind it stands another mark than the tokenizer's end, or an end and more."""
    tokenizer, plain = load_tokenizer(chat), load_tokenizer(base)
    assert tokenizer.end_ids == [400]  # the end mark itself, and a newline behind it
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|im_start|>")
    assert tokenizer.end_ids == [400, 401]
    end = "{{ m.content }}<|im_start|>\n{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    for template in (
        "{% for m in messages %}{{ m.role }}" + end,  # as Phi-3: the end mark once, behind all of it
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_start|>{% endfor %}",
    ):
        tokenizer.chat_template = template
        assert tokenizer.end_ids == [400, 401]
    for template in (None, "{{ nothing.at.all }}", CHATML.replace("<|im_end|>", ""), "{{ messages[0].content }}"):
        plain.chat_template = template
        assert plain.end_ids == [plain.eos_id]


def test_a_saved_configuration_names_marks_and_no_code(chat: Path, tmp_path: Path) -> None:
    """Catches code that the gate of an export refuses in the end, and a configuration that is not there at all."""
    path = chat / "tokenizer_config.json"
    values = json.loads(path.read_text())
    marks = {name: values[name] for name in ("bos_token", "eos_token", "unk_token")}
    path.write_text(json.dumps(values | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    load_tokenizer(chat).save(tmp_path / "without code", 512)
    (chat / "special_tokens_map.json").write_text(json.dumps(marks))
    (chat / "chat_template.jinja").write_text(CHATML)
    path.unlink()
    load_tokenizer(chat).save(tmp_path / "made", 512)
    for name in ("without code", "made"):
        saved = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert saved.items() >= marks.items() and "auto_map" not in saved
        assert "same by transformers" in check_tokenizer(tmp_path / name, load_tokenizer(tmp_path / name)).finding


@pytest.mark.parametrize("mark", ["bos_token", "eos_token", "pad_token"])
def test_another_mark_is_seen(base: Path, tmp_path: Path, mark: str) -> None:
    """Catches documents that end in the sentencepiece model's mark where the configuration names another."""
    tokenizer = load_tokenizer(derive(base, tmp_path, **{mark: "<unk>"}))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}[mark] == 0


@pytest.mark.parametrize("is_ours", [True, False])
def test_files_that_say_the_same_leave_the_sentencepiece_model(
    base: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path, is_ours: bool
) -> None:
    """Catches a run that finds another fingerprint beside its shards than it was prepared with."""
    made = tokenizer if is_ours else load_tokenizer(base / "tokenizer.model")
    made.save(tmp_path, 512)
    if not is_ours:  # as Mixtral's
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "pad_token": null}')
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer) and loaded.fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", '{"<|im_end|>": 400}'),
        ("added_tokens.json", '{"<|im_end|>": "400"}'),
        ("tokenizer_config.json", '{"eos_token": "<|im_end|>"}'),
    ],
)
def test_what_only_a_tokenizer_json_could_say_is_refused(base: Path, tmp_path: Path, file: str, content: str) -> None:
    """Catches added tokens that are lost because there is only a sentencepiece model to read."""
    (tmp_path / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=r"has added or changed '<\|im_end\|>', .* no tokenizer.json; .*\.$"):
        load_tokenizer(tmp_path)
