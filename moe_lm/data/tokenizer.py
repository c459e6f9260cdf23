"""What the rest of the program asks of a tokenizer, and loading one of either kind.

The kinds are sentencepiece models, which are also trained here (`tokenizer_sentencepiece.py`), and directories in
Hugging Face's layout (`tokenizer_huggingface.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.tokenizer_files import MODEL_FILE
from moe_lm.data.tokenizer_huggingface import TOKENIZER_FILE, HuggingFaceTokenizer, goes_beyond, read_chat_template
from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer
from moe_lm.errors import InputError


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer, whichever kind it is."""

    fingerprint: str
    """SHA-256 (hex) of the file that decides every id."""
    vocab_size: int
    bos_id: int
    """Id at each document's begin."""
    eos_id: int
    """Id at each document's end; where a tokenizer has one mark only, the same as `bos_id`."""
    pad_id: int
    chat_template: str | None
    """The Jinja template that conversations are rendered with; null if there is none."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of `bos_token`, `eos_token` …, which templates write."""

    @property
    def is_by_character(self) -> bool:
        """Whether each piece of text is one character."""

    @property
    def control_strings(self) -> list[str]:
        """The texts of all control ids that are longer than one character."""

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without control ids: a control string inside the text is text."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[NDArray[np.int32] | list[int]]:
        """Encodes many texts on this core, without control ids."""

    def encode_rendered(
        self, text: str, breaker: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes what a chat template rendered.

        Args:
            text: Its control strings become control ids, unless the breaker is inside of them.
            breaker: A character that is left out.
            spans: Parts [begin, end) of the text, in characters and in order.

        Returns:
            The ids, and of each span the ids [begin, end) that hold any of its characters; spans without ids are left
            out.
        """

    def encode_chat(self, messages: list[dict[str, str]], ask: bool) -> list[int]:
        """Encodes a conversation by the tokenizer's own template, for the assistant to go on with where `ask` says so;
        `InputError` where the template fails.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; control ids become nothing, bytes that are not UTF-8 become U+FFFD."""

    @property
    def generated_ids(self) -> list[int]:
        """Ids that a text may go on with: its pieces, and the end mark; not the other control ids."""

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text: the end mark, and what else closes an answer; see `chat_template.end_ids`."""

    def save(self, directory: Path, model_max_length: int) -> None:
        """Writes the files that transformers loads it from, and that `load_tokenizer` loads it from."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer from a sentencepiece model, or from a directory in Hugging Face's layout.

    Where a directory has both, as our exports do, the sentencepiece model is the tokenizer, unless the files beside it
    have more: a base's model with the tokens and end mark of its chat derivative is the common case.

    Raises:
        InputError: There is none, or one that can not be used.
    """
    if not path.is_dir():  # only the user gives a file
        try:
            return SentencePieceTokenizer(path)
        except InputError as error:
            raise InputError(f"tokenizer.path: {error}") from None
    if (path / MODEL_FILE).exists():
        tokenizer = SentencePieceTokenizer(path / MODEL_FILE)
        if goes_beyond(path, tokenizer):
            return HuggingFaceTokenizer(path)
        tokenizer.chat_template = read_chat_template(path)
        return tokenizer
    if (path / TOKENIZER_FILE).exists():
        return HuggingFaceTokenizer(path)
    raise InputError(f"tokenizer.path: '{path}' holds neither {MODEL_FILE} nor {TOKENIZER_FILE}.")
