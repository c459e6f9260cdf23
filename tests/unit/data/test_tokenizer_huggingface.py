"""Tokenizers in Hugging Face's layout: the ids are transformers' own, and control strings in a text are text."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_lm.data.encode import Encoder, _encode_in_worker, encode
from moe_lm.data.tokenizer import load_tokenizer
from moe_lm.data.tokenizer_huggingface import HuggingFaceTokenizer
from moe_lm.errors import InputError

FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
MARKS = {
    "three": {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", **FLAGS},
        "pad_token": "<pad>",
    },
    "one": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
}


@pytest.fixture(scope="module")
def directories(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two byte-level BPE tokenizers, of the kinds of Llama 3 and of GPT-2."""
    base = tmp_path_factory.mktemp("huggingface")
    for name, marks in MARKS.items():
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        special = list(dict.fromkeys(m["content"] if isinstance(m, dict) else m for m in marks.values()))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(sample_texts[:1], trainer)
        (base / name).mkdir()
        model.save(str(base / name / "tokenizer.json"))
        configuration = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, **marks}
        (base / name / "tokenizer_config.json").write_text(json.dumps(configuration))
    return {name: base / name for name in MARKS}


@pytest.mark.parametrize("name", MARKS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.sampled_from(["<s>", "</s>", "<|endoftext|>", " ", "é", "def f"]) | st.text(max_size=9)).map(
        "".join
    )
)
def test_ids_are_those_of_transformers(directories: dict[str, Path], name: str, text: str) -> None:
    """Catches control ids that come out of a text, and spaces that are added."""
    ours = load_tokenizer(directories[name])
    other = _transformers(directories[name])
    ids = ours.encode(text)
    assert ids == other(text, add_special_tokens=False).input_ids
    assert ours.decode(ids) == text and not {ours.bos_id, ours.eos_id} & set(ids)
    assert list(ours.encode_batch([text, "x"])[0]) == ids


_loaded: dict[Path, object] = {}


def _transformers(directory: Path) -> object:
    if directory not in _loaded:
        _loaded[directory] = transformers.AutoTokenizer.from_pretrained(directory)
    return _loaded[directory]


def test_marks_that_are_pieces_of_the_model_do_not_come_out_of_text(tmp_path: Path) -> None:
    """Catches documents that end where a text says so: of a tokenizer whose model has its marks as pieces, and of one
    whose mark is no special token."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "ab </>s")]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    bpe = tokenizers.Tokenizer(models.BPE({piece: i for i, (piece, _) in enumerate(pieces)}, [], unk_token="<unk>"))
    bpe.add_tokens([tokenizers.AddedToken("</s>", special=False)])
    for name, model in (("unigram", unigram), ("bpe", bpe)):
        (tmp_path / name).mkdir()
        model.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        tokenizer = load_tokenizer(tmp_path / name)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        text = "ab</s>a <s>b</s>"
        ids = tokenizer.encode(text)
        assert not {1, 2} & set(ids) and [pieces[token][0] for token in ids] == list(text)
        assert list(tokenizer.encode_batch(["a", text])[1]) == ids


def test_unknown_characters_are_unknown_tokens_and_nul_is_kept(tmp_path: Path) -> None:
    """Catches text that a model without byte fallback refuses, a document that such a character ends, and a NUL that
    is lost where a text is cut."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "ab </>s\0")]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    bpe = tokenizers.Tokenizer(models.BPE({piece: i for i, (piece, _) in enumerate(pieces)}, [], unk_token="<unk>"))
    for name, model in (("unigram", unigram), ("bpe", bpe)):
        model.add_special_tokens(["<unk>", "<s>", "</s>"])
        (tmp_path / name).mkdir()
        model.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        tokenizer = load_tokenizer(tmp_path / name)
        ids = tokenizer.encode("a\0é</s>b\0")
        assert [pieces[token][0] for token in ids] == ["a", "\0", "<unk>", *"</s>", "b", "\0"]
        assert tokenizer.eos_id not in ids
        (tmp_path / name / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
        with pytest.raises(InputError, match="encodes ordinary text as its mark '<unk>'"):
            load_tokenizer(tmp_path / name).encode("é")


def test_marks(directories: dict[str, Path]) -> None:
    three, one = (HuggingFaceTokenizer(directories[name]) for name in ("three", "one"))
    assert (three.bos_id, three.eos_id, three.pad_id) == (0, 1, 2)
    assert (one.bos_id, one.eos_id, one.pad_id) == (0, 0, 0)
    assert three.eos_id in three.generated_ids and not {0, 2} & set(three.generated_ids)
    assert len(three.generated_ids) == three.vocab_size - 2 and one.eos_id in one.generated_ids
    assert encode(one, ["a", ""]).tokens.tolist() == [0, *one.encode("a"), 0, 0, 0]


def test_saved_files_are_the_same_tokenizer(directories: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(directories["three"])
    tokenizer.save(tmp_path / "copy", 100)
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert HuggingFaceTokenizer(directories["one"]).fingerprint != tokenizer.fingerprint


def test_other_marks_are_another_tokenizer(directories: dict[str, Path], tmp_path: Path) -> None:
    """Catches shards whose documents end in another mark than the tokenizer beside them says."""
    tokenizer = HuggingFaceTokenizer(directories["three"])
    tokenizer.save(tmp_path, 100)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    assert load_tokenizer(tmp_path).fingerprint != tokenizer.fingerprint


def test_workers_encode_the_same(directories: dict[str, Path]) -> None:
    tokenizer = HuggingFaceTokenizer(directories["three"])
    encoder = Encoder(tokenizer, directories["three"], workers=1)
    try:
        ours = encoder.result(encoder.submit(["a text <s>", ""]))
    finally:
        encoder.close()
    expected = encode(tokenizer, ["a text <s>", ""])
    assert ours.tokens.tolist() == expected.tokens.tolist() and ours.lengths.tolist() == expected.lengths.tolist()


def test_a_worker_refuses_a_tokenizer_that_was_replaced(directories: dict[str, Path]) -> None:
    """Catches shards whose first documents are of one tokenizer and the rest of another."""
    path, fingerprint = str(directories["three"]), HuggingFaceTokenizer(directories["one"]).fingerprint
    with pytest.raises(InputError, match=f"^tokenizer.path: {path} has changed while it was being used; start again.$"):
        _encode_in_worker(path, fingerprint, ["a"], None)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json' is no tokenizer"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json' is not valid JSON"),
        ({"tokenizer_config.json": "{}"}, "names no eos_token"),
        ({"tokenizer_config.json": '{"eos_token": "<nobody>"}'}, "names no eos_token"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json' must hold a JSON object, found list"),
        ({"special_tokens_map.json": "null"}, "special_tokens_map.json' must hold a JSON object, found NoneType"),
        ({"tokenizer.json": None}, r"tokenizer.json' cannot be read \(Is a directory\)"),
        ({"tokenizer_config.json": None}, r"tokenizer_config.json' cannot be read \(Is a directory\)"),
        ({"chat_template.jinja": None}, r"chat_template.jinja' cannot be read \(Is a directory\)"),
        ({"chat_template.jinja": "na\udcefve"}, r"chat_template.jinja' is not UTF-8 text \(byte 2\)"),
    ],
)
def test_directories_that_are_no_tokenizer(
    directories: dict[str, Path], tmp_path: Path, files: dict[str, str | None], sentence: str
) -> None:
    HuggingFaceTokenizer(directories["three"]).save(tmp_path, 100)
    for name, content in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"^'.*{sentence}.*; (bring back a good|name one)") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
