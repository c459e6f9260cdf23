"""The sentencepiece tokenizer, BPE or by character: trained here, loaded here, exported for transformers in
`tokenizer_export.py`.

Lossless: identity normalisation, no dummy space in front, byte fallback; so decoding gives back any text but U+2581,
which sentencepiece itself uses for the space. Control symbols (`<s>`, role marks, spares) never come out of text: a
text that contains "<s>" is encoded as those three characters, and only our own code inserts the id.

Options of BPE measured on the standard library (V 4096, held-out files): bytes per token, seconds to train on 11.5 MB,
and bits per byte of an interpolated 6-gram model over all the tokens, or over 900 k of them in random rows.

    sentencepiece's defaults, fed lines                     2.14   1.2 s
    and allow_whitespace_only_pieces (indentation)          3.09   1.5 s
    and fed chunks that span lines (newlines get pieces)    3.28   1.4 s   1.642   1.798
    and split_by_unicode_script=False (`self.`)             3.60   1.4 s   1.617   1.763
    and pieces of up to 24 characters: chosen               3.61   1.4 s   1.616   1.755
    chosen, with split_digits                               3.36   1.4 s   1.652   1.818
    chosen, with treat_whitespace_as_suffix                 3.67   1.6 s   1.617   1.773
    chosen, with split_by_whitespace=False (many words)     4.03   3.1 s   1.609   1.759

The last two give fewer tokens, but tokens as much harder to predict; and a prompt then more often ends inside what
training had as one piece ("import" where the piece is "import ").
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from moe_lm.data.chat_template import ROLE_MARKS, encode_chat, end_ids
from moe_lm.data.config import MIN_VOCAB_SIZE, TokenizerKind
from moe_lm.data.tokenizer_export import save_tokenizer_files
from moe_lm.data.tokenizer_files import GOOD_COPY, MODEL_FILE, SPACE
from moe_lm.data.tokenizer_rendered import encode_rendered
from moe_lm.errors import InputError
from moe_lm.files import write_atomically

NUM_SPARES = 32
CONTROL_SYMBOLS = (*ROLE_MARKS, *(f"<|spare_{index}|>" for index in range(NUM_SPARES)))

CHUNK_CHARACTERS = 4000
"""Training text is fed in pieces of this length: a "sentence" of sentencepiece may then span lines, which is what
gives newlines and indentation pieces of their own."""

MAX_PIECE_CHARACTERS = 24

LOST_CHARACTERS = re.compile("[\t\u2585]")
"""sentencepiece's internal marks, of a boundary and of what is unknown: it leaves out a sentence that holds one, so the
text is split there."""

_OPTIONS: dict[TokenizerKind, dict[str, Any]] = {
    TokenizerKind.bpe: {
        "model_type": "bpe",
        "allow_whitespace_only_pieces": True,
        "split_by_unicode_script": False,
        "split_by_whitespace": True,
        "max_sentencepiece_length": MAX_PIECE_CHARACTERS,
    },
    # Every character that there is room for, the most frequent first: by default the rarest 0.05 % of a text are bytes.
    TokenizerKind.character: {"model_type": "char", "character_coverage": 1.0},
}
"""What the kinds do not share."""


class SentencePieceTokenizer:
    """A sentencepiece model; the same on every machine that has its file."""

    def __init__(self, path: Path) -> None:
        """Loads a model.

        Raises:
            InputError: The file is missing, is no sentencepiece model, or has no begin and end of document.
        """
        try:
            self.model_bytes = path.read_bytes()
            # An empty model raises nothing until it is used.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes or b"empty")
        except OSError as error:
            raise InputError(f"'{path}' cannot be read ({error.strerror}); {GOOD_COPY}.") from None
        except RuntimeError:
            raise InputError(f"'{path}' is not a sentencepiece .model file; {GOOD_COPY}.") from None
        self.fingerprint = hashlib.sha256(self.model_bytes).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise InputError(f"'{path}' has no <s> or </s> to mark a document's begin and end; use another tokenizer.")
        # Models made elsewhere (Mixtral's among them) often have no padding; any id will do, since it is masked.
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.chat_template: str | None = None

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The texts of `bos_token`, `eos_token` …, which templates write."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: self.piece(token) for name, token in (*ids.items(), ("unk_token", self._processor.unk_id()))}

    @cached_property
    def control_ids(self) -> set[int]:
        """Ids that are no text: control symbols, and `<unk>`."""
        return {token for token in range(self.vocab_size) if self.is_control(token) or self.is_unknown(token)}

    @cached_property
    def control_strings(self) -> list[str]:
        """The texts of all control ids that are longer than one character."""
        return [piece for i in sorted(self.control_ids) if len(piece := self.piece(i)) > 1]

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds control strings, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.control_strings, key=len, reverse=True))))

    @cached_property
    def has_dummy_prefix(self) -> bool:
        """Whether the model puts a space in front of every text, as Mixtral's does."""
        return self.piece(self.encode("a")[0]).startswith(SPACE)

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without control ids."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encodes many texts on this core, without control ids."""
        return self._processor.encode_as_numpy(list(texts), num_threads=1)

    def encode_rendered(
        self, text: str, breaker: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes what a chat template rendered; see `Tokenizer.encode_rendered`."""
        return encode_rendered(self, text, breaker, spans)

    def encode_chat(self, messages: list[dict[str, str]], ask: bool) -> list[int]:
        """Encodes a conversation by the tokenizer's own template; see `chat_template.encode_chat`."""
        return encode_chat(self, messages, ask)

    def save(self, directory: Path, model_max_length: int) -> None:
        """Writes the files that transformers loads it from, and that `load_tokenizer` loads it from."""
        save_tokenizer_files(self, directory, model_max_length)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; control ids become nothing, bytes that are not UTF-8 become U+FFFD."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """The piece of an id as sentencepiece writes it (spaces as U+2581)."""
        return self._processor.id_to_piece(token)

    def is_control(self, token: int) -> bool:
        """Whether an id is a control symbol, which no text encodes to."""
        return self._processor.is_control(token)

    @cached_property
    def generated_ids(self) -> list[int]:
        """Ids that a text may go on with: its pieces, and the end mark; not the other control ids, nor `<unk>`."""
        return [i for i in range(self.vocab_size) if i == self.eos_id or i not in self.control_ids]

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text: the end mark, and what else closes an answer; see `chat_template.end_ids`."""
        return end_ids(self)

    @cached_property
    def is_by_character(self) -> bool:
        """Whether each piece of text is one character."""
        return all(len(self.piece(token)) == 1 for token in self.text_ids)

    @cached_property
    def text_ids(self) -> list[int]:
        """Ids of pieces of text: neither control ids, nor `<unk>`, nor bytes."""
        return [i for i in range(self.vocab_size) if i not in self.control_ids and not self.is_byte(i)]

    def token_id(self, piece: str) -> int:
        """The id of a piece such as `<|user|>`.

        Raises:
            KeyError: There is no such piece.
        """
        token = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(token) != piece:
            raise KeyError(piece)
        return token

    def is_piece(self, piece: str, token: int) -> bool:
        """Whether a piece has this id."""
        return token in range(self.vocab_size) and self.piece(token) == piece

    def is_byte(self, token: int) -> bool:
        """Whether an id stands for a single byte."""
        return self._processor.is_byte(token)

    def is_unknown(self, token: int) -> bool:
        """Whether an id is the unknown symbol."""
        return self._processor.is_unknown(token)

    def score(self, token: int) -> float:
        """The score of a piece; in BPE, minus its rank among the merges, of characters their logarithmic frequency."""
        return self._processor.get_score(token)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    directory: Path,
    training_bytes: int = 32_000_000,
    kind: TokenizerKind = TokenizerKind.bpe,
) -> SentencePieceTokenizer:
    """Trains a tokenizer and writes `tokenizer.model` into a directory (made if missing).

    Args:
        texts: The documents; iterated once, and never held all at a time.
        vocab_size: Number of ids in all, control and byte ids included; of characters the most there may be.
        directory: Where the model goes.
        training_bytes: Most UTF-8 bytes to train on; more is thinned out evenly over all the text.
        kind: What ids are for.

    Returns:
        The trained tokenizer. The same texts give the same model, byte for byte.

    Raises:
        InputError: The text holds too few different pieces for `vocab_size`, or too many characters.
    """
    model = io.BytesIO()
    sentences = (
        part for chunk in training_chunks(texts, training_bytes) for part in LOST_CHARACTERS.split(chunk) if part
    )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            **_OPTIONS[kind],
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=16 * CHUNK_CHARACTERS,
            required_chars=SPACE,  # without a piece of its own it would be spelt in the bytes of U+2581
            control_symbols=list(CONTROL_SYMBOLS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(error, vocab_size) from None
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / MODEL_FILE, model.getvalue())
    return SentencePieceTokenizer(directory / MODEL_FILE)


def training_chunks(texts: Iterable[str], training_bytes: int) -> list[str]:
    """Cuts texts into chunks; of more than `training_bytes`, keeps evenly spaced ones of at most that size.

    One pass in bounded memory: whenever too much is kept, every second chunk goes, and from then on as many are passed
    over between two that are kept.
    """
    kept: list[str] = []
    size = number = 0
    stride = 1
    for text in texts:
        for start in range(0, len(text), CHUNK_CHARACTERS):
            if number % stride == 0:
                kept.append(text[start : start + CHUNK_CHARACTERS])
                size += len(kept[-1].encode())
            number += 1
            while size > training_bytes and len(kept) > 1:
                kept = kept[::2]
                size, stride = sum(len(chunk.encode()) for chunk in kept), 2 * stride
    return kept


def _training_error(error: RuntimeError, vocab_size: int) -> Exception:
    """Turns sentencepiece's complaints about the vocabulary's size into a user's sentence; others stay as they are."""
    text = str(error)
    too_high = re.search(r"Vocabulary size too high.*?<= (\d+)", text)
    if "sentences_.empty()" in text or "all_chars_count" in text or (too_high and int(too_high[1]) < MIN_VOCAB_SIZE):
        return InputError(
            f"tokenizer.vocab_size={vocab_size}: the training text has too few different words for any tokenizer; "
            "give more, or take a tokenizer with tokenizer.path."
        )
    if too_high:
        return InputError(
            f"tokenizer.vocab_size={vocab_size}: the training text is too small for it; "
            f"the largest that works is {too_high[1]}."
        )
    too_small = re.search(r"smaller than required_chars\D+\d+ vs (\d+)", text)
    if too_small:
        return InputError(
            f"tokenizer.vocab_size={vocab_size}: the training text has too many different characters for it; "
            f"use more than {too_small[1]}."
        )
    return error
