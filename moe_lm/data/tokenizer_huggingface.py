"""Tokenizers in Hugging Face's layout: tokenizer.json and the files beside it. Nothing in them is run as code."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_lm.errors import InputError
from moe_lm.files import write_atomically

TOKENIZER_FILE = "tokenizer.json"
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
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
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core each: a pool has a process per core
        import tokenizers

        self.directory = directory
        try:
            content = (directory / TOKENIZER_FILE).read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except OSError as error:
            raise InputError(f"tokenizer.path: '{error.filename}' cannot be read ({error.strerror}).") from None
        except Exception as error:  # tokenizers raises Exception itself
            raise InputError(f"tokenizer.path: '{directory / TOKENIZER_FILE}' is no tokenizer ({error}).") from None
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
                f"tokenizer.path: '{directory}' names no eos_token in tokenizer_config.json or special_tokens_map.json "
                "that its vocabulary has; a document's end needs a mark."
            )
        self.eos_id: int = ends[0]
        self.bos_id: int = ids.get("bos", self.eos_id)
        self.pad_id: int = ids.get("pad", self.eos_id)

        added = self._tokenizer.get_added_tokens_decoder()
        self._marks = {token: added[token].content for token in added if added[token].special}
        self._marks |= {token: marks[name] for name, token in ids.items()}

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
            InputError: Even so a mark comes out of text.
        """
        strings = sorted((mark for mark in self._marks.values() if len(mark) > 1), key=len, reverse=True)
        parts = re.sub("|".join(map(re.escape, strings)), lambda m: f"{m[0][0]}\0{m[0][1:]}", text).split("\0")
        encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        ids = [token for encoding in encodings for token in encoding.ids]
        if not self._marks.keys().isdisjoint(ids):
            mark = self._marks[min(self._marks.keys() & set(ids))]
            raise InputError(
                f"tokenizer.path: '{self.directory}' encodes ordinary text as its mark {mark!r}; use a tokenizer that "
                "keeps marks apart from text."
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; control ids become nothing."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    @cached_property
    def generated_ids(self) -> list[int]:
        """Ids that a text may go on with: the vocabulary's, and the end mark; not the other control ids."""
        special = {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        special |= {self.bos_id, self.pad_id}
        return sorted({*self._tokenizer.get_vocab(with_added_tokens=True).values()} - special | {self.eos_id})

    def save(self, directory: Path, model_max_length: int) -> None:
        """Copies the files as they are, whatever the length: the tokenizer is somebody else's."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in (*COMPANIONS, TOKENIZER_FILE):
            if (self.directory / name).exists():
                write_atomically(directory / name, (self.directory / name).read_bytes())


def _marks(directory: Path) -> dict[str, str]:
    """The texts of bos, eos and pad, as far as the configuration names them.

    Raises:
        InputError: A file is there, but can not be read.
    """
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / file
        try:
            values: Any = json.loads(path.read_bytes()) if path.exists() else {}
        except OSError as error:
            raise InputError(f"tokenizer.path: '{path}' cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise InputError(f"tokenizer.path: '{path}' is not valid JSON ({error}).") from None
        if not isinstance(values, dict):
            raise InputError(f"tokenizer.path: '{path}' must hold a JSON object, found {type(values).__name__}.")
        for name in ("bos", "eos", "pad"):
            token = values.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                named[name] = text
    return named
