"""Tokenizers in Hugging Face's layout: tokenizer.json and the files beside it. Nothing in them is run as code."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lm.data.chat_template import encode_chat, end_ids
from moe_lm.data.tokenizer_files import GOOD_COPY, MODEL_FILE
from moe_lm.data.tokenizer_rendered import token_spans
from moe_lm.errors import InputError
from moe_lm.files import write_atomically, write_json

if TYPE_CHECKING:
    import tokenizers

    from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
MARKS = ("bos", "eos", "unk", "pad")
COMPANIONS = (
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Other files of a tokenizer, copied as they are."""


class HuggingFaceTokenizer:
    """A tokenizer.json, with the marks that its configuration names."""

    def __init__(self, directory: Path) -> None:
        """Loads a directory.

        Raises:
            InputError: The files can not be read, or name no mark for a document's end.
        """
        self.directory = directory
        content, self._tokenizer = _read_tokenizer(directory)
        marks = _marks(directory)
        # Control strings inside a text are text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(content + json.dumps(marks, sort_keys=True).encode()).hexdigest()
        # Ids may have gaps, and an embedding is as long as the highest.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        found = {name: self._tokenizer.token_to_id(text) for name, text in marks.items()}
        ids = {name: token for name, token in found.items() if token is not None}
        ends = [ids[name] for name in ("eos", "bos") if name in ids]
        if not ends:
            raise InputError(
                f"'{directory}' names no eos_token in tokenizer_config.json or special_tokens_map.json that its "
                "vocabulary has, and a document's end needs a mark; name one there."
            )
        self.eos_id: int = ends[0]
        self.bos_id: int = ids.get("bos", self.eos_id)
        self.pad_id: int = ids.get("pad", self.eos_id)

        added = self._tokenizer.get_added_tokens_decoder()
        self._marks = {token: added[token].content for token in added if added[token].special}
        self._marks |= {token: marks[name] for name, token in ids.items()}
        # What a model without byte fallback makes of a character it does not know is no forged mark.
        unknown = {_unknown_id(content, self._tokenizer)} - {self.bos_id, self.eos_id}
        self._refused = self._marks.keys() - unknown
        self.chat_template = read_chat_template(directory)
        self.special_tokens = {f"{name}_token": text for name, text in _marks(directory, MARKS).items()}
        self.is_by_character = False  # nobody compares such models by character
        self.control_strings = sorted(text for text in self._marks.values() if len(text) > 1)

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without control ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts on this core, without control ids."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        documents = (encoding.ids for encoding in encodings)
        return [
            ids if self._marks.keys().isdisjoint(ids) else self._encode_in_parts(text)
            for text, ids in zip(texts, documents)
        ]

    def _encode_in_parts(self, text: str) -> list[int]:
        """Encodes a text whose mark strings this tokenizer takes for marks, because its model has them as pieces: the
        text is cut within each.

        Raises:
            InputError: Even so a mark comes out of text, other than that of unknown characters.
        """
        strings = sorted(self.control_strings, key=len, reverse=True)
        found = re.finditer("|".join(map(re.escape, strings)), text) if strings else ()
        cuts = [0, *(match.start() + 1 for match in found), len(text)]
        parts = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
        encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        ids = [token for encoding in encodings for token in encoding.ids]
        if not self._refused.isdisjoint(ids):
            mark = self._marks[min(self._refused & set(ids))]
            raise InputError(
                f"'{self.directory}' encodes ordinary text as its mark {mark!r}; use a tokenizer that "
                "keeps marks apart from text."
            )
        return ids

    def encode_rendered(
        self, text: str, breaker: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes what a chat template rendered; see `Tokenizer.encode_rendered`.

        As transformers does, in one piece, since a tokenizer.json may treat the beginning of a text in its own way. It
        is cut where a control string is broken, and goes on behind a newline, which is then taken out again.
        """
        ids: list[int] = []
        begins: list[int] = []
        ends: list[int] = []
        behind = 0
        self._tokenizer.encode_special_tokens = False
        try:
            for part in text.split(breaker):
                encoding = self._tokenizer.encode("\n" * (behind > 0) + part, add_special_tokens=False)
                skipped = sum(end <= 1 for _, end in encoding.offsets) if behind else 0
                if behind and skipped == 0:  # the newline is one token with what is behind it
                    encoding = self._tokenizer.encode(part, add_special_tokens=False)
                shift = behind - 1 if skipped else behind
                ids += encoding.ids[skipped:]
                begins += [begin + shift for begin, _ in encoding.offsets[skipped:]]
                ends += [end + shift for _, end in encoding.offsets[skipped:]]
                behind += len(part) + len(breaker)
        finally:
            self._tokenizer.encode_special_tokens = True
        return ids, token_spans(begins, ends, spans)

    def encode_chat(self, messages: list[dict[str, str]], ask: bool) -> list[int]:
        """Encodes a conversation by the tokenizer's own template; see `chat_template.encode_chat`."""
        return encode_chat(self, messages, ask)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; control ids become nothing."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    @cached_property
    def generated_ids(self) -> list[int]:
        """Ids that a text may go on with: the vocabulary's, and the end mark; not the other control ids."""
        special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        special |= {self.bos_id, self.pad_id}
        return sorted({*self._tokenizer.get_vocab(with_added_tokens=True).values()} - special | {self.eos_id})

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text: the end mark, and what else closes an answer; see `chat_template.end_ids`."""
        return end_ids(self)

    def save(self, directory: Path, model_max_length: int) -> None:
        """Copies the files as they are, whatever the length: the tokenizer is somebody else's. Only the template may be
        another, and the configuration names the marks, no code, and the class that reads tokenizer.json as it stands,
        as we do: some of transformers' own (Llama's) take the vocabulary out of it and treat leading spaces in their
        way.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name in (*COMPANIONS, TOKENIZER_FILE, MODEL_FILE):
            if (self.directory / name).exists():
                write_atomically(directory / name, (self.directory / name).read_bytes())
        there = _read_object(directory / CONFIG_FILE)
        marks = {f"{name}_token": text for name, text in _marks(directory, MARKS).items()}
        config = marks | {name: value for name, value in there.items() if name != "auto_map"}
        config["tokenizer_class"] = PLAIN_CLASS
        if config != there:
            write_json(directory / CONFIG_FILE, config)
        write_chat_template(directory, self.chat_template)


def goes_beyond(directory: Path, model: "SentencePieceTokenizer") -> bool:
    """Whether the files beside a sentencepiece model have tokens that it lacks, or name other marks than it has.

    Raises:
        InputError: They do, and there is no tokenizer.json that has them; or a file can not be read.
    """
    has_json = (directory / TOKENIZER_FILE).exists()
    if has_json:
        tokens = _read_tokenizer(directory)[1].get_vocab(with_added_tokens=True)
    else:  # as older versions of transformers left it
        tokens = _read_object(directory / "added_tokens.json")
    more = sorted(text for text, token in tokens.items() if not model.is_piece(text, token))
    own = model.special_tokens
    more += [text for name, text in _marks(directory).items() if own[f"{name}_token"] != text]
    if more and not has_json:
        raise InputError(
            f"'{directory}' has added or changed {more[0]!r}, which its {MODEL_FILE} does not say, and "
            f"no {TOKENIZER_FILE}; write one with transformers (AutoTokenizer.from_pretrained, save_pretrained)."
        )
    return bool(more)


def read_chat_template(directory: Path) -> str | None:
    """The chat template of a tokenizer's directory, where transformers looks for it; null if there is none.

    Raises:
        InputError: A file is there, but can not be read.
    """
    path = directory / TEMPLATE_FILE
    if path.exists():
        try:
            return path.read_bytes().decode()
        except OSError as error:
            raise InputError(f"'{path}' cannot be read ({error.strerror}); {GOOD_COPY}.") from None
        except UnicodeDecodeError as error:
            raise InputError(f"'{path}' is not UTF-8 text (byte {error.start}); {GOOD_COPY}.") from None
    template = _read_object(directory / CONFIG_FILE).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def write_chat_template(directory: Path, template: str | None) -> None:
    """Writes the chat template that transformers takes before any other; one that stood there goes."""
    if template is None:
        (directory / TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        write_atomically(directory / TEMPLATE_FILE, template.encode())


def _read_tokenizer(directory: Path) -> "tuple[bytes, tokenizers.Tokenizer]":
    """The content of tokenizer.json, and the tokenizer that it is.

    Raises:
        InputError: It can not be read, or is none.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core each: a pool has a process per core
    import tokenizers

    try:
        content = (directory / TOKENIZER_FILE).read_bytes()
        return content, tokenizers.Tokenizer.from_str(content.decode())
    except OSError as error:
        raise InputError(f"'{error.filename}' cannot be read ({error.strerror}); {GOOD_COPY}.") from None
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"'{directory / TOKENIZER_FILE}' is no tokenizer ({error}); {GOOD_COPY}.") from None


def _unknown_id(content: bytes, tokenizer: "tokenizers.Tokenizer") -> int | None:
    """The id that the model of a tokenizer.json gives to what it does not know; null if it has none."""
    model = json.loads(content)["model"]
    if model.get("unk_token") is not None:
        return tokenizer.token_to_id(model["unk_token"])
    return model.get("unk_id")  # unigram models


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file.

    Raises:
        InputError: The file is there, but can not be read.
    """
    try:
        values: Any = json.loads(path.read_bytes()) if path.exists() else {}
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}); {GOOD_COPY}.") from None
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON ({error}); {GOOD_COPY}.") from None
    if not isinstance(values, dict):
        raise InputError(f"'{path}' must hold a JSON object, found {type(values).__name__}; {GOOD_COPY}.")
    return values


def _marks(directory: Path, names: Sequence[str] = ("bos", "eos", "pad")) -> dict[str, str]:
    """The texts of marks, as far as the configuration names them.

    Raises:
        InputError: A file is there, but can not be read.
    """
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", CONFIG_FILE):
        values = _read_object(directory / file)
        for name in names:
            token = values.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                named[name] = text
    return named
