"""Whether transformers reads the same ids out of a text as training did, on texts that are made to find where not."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_lm.errors import InputError
from moe_lm.hf.receipt import Check, VerificationError
from moe_lm.hf.silence import quiet_transformers

_CODE = (
    "def f(x: int) -> str:\n    return f'{x!r:>{8}}'  # \\n\n",
    "for (;;) { a[i++] ^= b->c & 0xFFu; }\n\t// tab\r\n",
    '{"messages": [{"role": "user", "content": "\\u00e9"}]}',
    "SELECT * FROM t WHERE a <> 'b''c';\n\n\n    -- x",
    "https://example.org/a?b=c&d=%20#e 1,234.5e-6 0x1F",
)
_RANGES = (
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x300, 0x370),
    (0x400, 0x500),
    (0x590, 0x700),
    (0x900, 0xA00),
    (0x2000, 0x2C00),
    (0x3040, 0x3100),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A4),
    (0xFB00, 0xFE10),
    (0x1F300, 0x1FB00),
    (0x20000, 0x20100),
    (0x0, 0x20),
)
"""Code points that are drawn from, block by block: letters of many scripts, marks, ligatures, pictures, controls."""


class TextTokenizer(Protocol):
    """What an export asks of the tokenizer that a model was trained with."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which control strings are text; `InputError` where it has none."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def save(self, directory: Path, model_max_length: int) -> None:
        """Write the files that transformers loads it from."""


def check_tokenizer(directory: Path, tokenizer: TextTokenizer) -> Check:
    """Compare ids on several hundred texts.

    transformers is asked to take control strings inside a text as text, as training does; an export says so in its
    tokenizer_config.json, other directories need not.

    Args:
        directory: Holds the tokenizer's files for transformers.
        tokenizer: What training used.

    Raises:
        VerificationError: The files can not be loaded, or a text has other ids.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            reader: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever a damaged file makes of its many readers
            raise VerificationError("tokenizer", f"transformers can not load its files ({error})") from error
        texts = list(fuzz_texts(tokenizer, [str(mark) for mark in reader.all_special_tokens]))
        theirs = reader(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    compared = 0
    for text, their_ids in zip(texts, theirs["input_ids"]):
        try:
            our_ids = list(tokenizer.encode(text))
        except InputError:  # training would not have read it either
            continue
        if our_ids != their_ids:
            raise VerificationError(
                "tokenizer", f"{text[:60]!r} is {_said(our_ids)} in training, and {_said(their_ids)} by transformers"
            )
        compared += 1
    return Check("tokenizer", f"the same ids by transformers, on {compared} texts of code, scripts and control strings")


def fuzz_texts(tokenizer: TextTokenizer, marks: Sequence[str], seed: int = 0) -> Iterator[str]:
    """Texts on which tokenizers differ: control strings, white space, code, characters and pieces at random.

    Args:
        tokenizer: Gives the pieces.
        marks: Its control strings.
        seed: Of the random ones.
    """
    yield from ("", " ", "  ", "\n", "\t", "\r\n", " a", "a ", "  a  b\n\n  c\t\t", "\u00a0", "\ufeff", "\x00")
    yield from _CODE
    for mark in marks:
        yield from (mark, f"a{mark}b", f" {mark} ", mark[:-1], mark * 3)
    draw = random.Random(seed)
    for _ in range(100):
        yield tokenizer.decode([draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(1, 20))])
    for number in range(300):
        pieces = []
        for _ in range(draw.randint(1, 12)):
            low, high = draw.choice(_RANGES[: 2 + number % len(_RANGES)])
            pieces.append("".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 6))))
            pieces.append(draw.choice(("", "", " ", "  ", "\n", draw.choice([*marks, "<"]))))
        yield "".join(pieces)


def _said(ids: Sequence[int]) -> str:
    return f"{list(ids[:8])}{'…' if len(ids) > 8 else ''}"
