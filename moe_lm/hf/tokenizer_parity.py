"""Whether transformers reads the same ids out of a text, and the same text out of ids, as training did: on texts and
conversations that are made to find where not.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_lm.errors import InputError
from moe_lm.hf.files import read_object
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


_BREAKER = "\ufdd0"
"""A noncharacter, which no control string holds."""

_CONVERSATIONS = (
    [("user", "a question")],
    [("user", "What is 2 + 2?"), ("assistant", "It is 4.")],
    [
        ("user", "  two spaces,\n\nlines and a tab\tin it "),
        ("assistant", "```python\ndef f(x):\n    return x\n```\n"),
        ("user", "Größe, 東京, \U0001f600, \u2581 and <s"),
        ("assistant", "é\u0301"),
    ],
    [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."), ("user", "And then")],
)
"""Roles and contents, without control strings: these have a treatment of their own in transformers."""


class TextTokenizer(Protocol):
    """What an export asks of the tokenizer that a model was trained with."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    chat_template: str | None

    @property
    def control_strings(self) -> list[str]:
        """The texts of all control ids that are longer than one character."""

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text, `eos_id` among them."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which control strings are text; `InputError` where it has none."""

    def encode_rendered(
        self, text: str, breaker: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, in which control strings are marks, and where they are of parts of it."""

    def encode_chat(self, messages: list[dict[str, str]], ask: bool) -> list[int]:
        """Ids of a conversation by the tokenizer's own template; `InputError` where the template fails."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def save(self, directory: Path, model_max_length: int) -> None:
        """Write the files that transformers loads it from."""


def check_tokenizer(directory: Path, tokenizer: TextTokenizer) -> Check:
    """Compare what the files make of several hundred texts, and of conversations, with what training does.

    transformers is asked to take control strings inside a text as text, as training does. By itself it does so where
    tokenizer_config.json says `split_special_tokens`, as an export without a chat template does; with one it can not,
    since its role marks are read back out of a rendered text.

    Args:
        directory: Holds the tokenizer's files for transformers.
        tokenizer: What training used.

    Raises:
        VerificationError: The files can not be loaded; or a text has other ids, its ids another text, a control string
            is none, a text does not begin with its mark, or a conversation has other ids.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            reader: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever a damaged file makes of its many readers
            raise VerificationError("tokenizer", f"transformers can not load its files ({error})") from error
        said = [
            _compare_texts(reader, tokenizer),
            _compare_control_strings(reader, tokenizer),
            _compare_begin(reader, tokenizer, directory),
            _compare_conversations(reader, tokenizer),
        ]
    return Check("tokenizer", f"the same by transformers: {'; '.join(said)}")


def _compare_texts(reader: Any, tokenizer: TextTokenizer) -> str:
    """Ids of texts, and texts of ids."""
    texts = list(fuzz_texts(tokenizer, sorted({*map(str, reader.all_special_tokens), *tokenizer.control_strings})))
    theirs = reader(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    compared, special = 0, set(reader.all_special_ids)
    for text, their_ids in zip(texts, theirs["input_ids"]):
        try:
            our_ids = list(tokenizer.encode(text))
        except InputError:  # training would not have read it either
            continue
        _same(repr(text[:60]), our_ids, their_ids)
        if special.isdisjoint(our_ids):  # a mark, or an unknown character, is written in various ways
            their_text = reader.decode(our_ids, clean_up_tokenization_spaces=False)
            if (our_text := tokenizer.decode(our_ids)) != their_text:
                raise VerificationError(
                    "tokenizer",
                    f"{_said(our_ids)} is {our_text[:60]!r} in training, and {their_text[:60]!r} by transformers",
                )
        compared += 1
    return f"ids of {compared} texts of code, scripts and control strings, and texts of these ids"


def _compare_control_strings(reader: Any, tokenizer: TextTokenizer) -> str:
    """Each is one id where a template writes it."""
    for mark in tokenizer.control_strings:
        ours, _ = tokenizer.encode_rendered(mark, _BREAKER, [])
        _same(
            f"the control string {mark!r}",
            ours,
            reader.encode(mark, add_special_tokens=False, split_special_tokens=False),
        )
    return f"{len(tokenizer.control_strings)} control strings"


def _compare_begin(reader: Any, tokenizer: TextTokenizer, directory: Path) -> str:
    """Every document of training begins with the mark. A sentencepiece model's texts do by transformers, too, unless
    its configuration says that they do not; of other tokenizers it is said what they do.
    """
    ids = tokenizer.encode("a b")
    theirs, marked = reader.encode("a b"), [tokenizer.bos_id, *ids]
    declared = read_object(directory / "tokenizer_config.json").get("add_bos_token")
    if declared or (declared is None and (directory / "tokenizer.model").exists()):
        _same("a text with the mark of its begin", marked, theirs)
    begins = theirs[: len(marked)] == marked
    return f"{'the' if begins else 'no'} begin mark in front of a text"


def _compare_conversations(reader: Any, tokenizer: TextTokenizer) -> str:
    """Ids by the chat template, of conversations that it takes: one may refuse a role, or what does not take turns."""
    if tokenizer.chat_template is None:
        if isinstance(reader.chat_template, str):
            raise VerificationError("tokenizer", "transformers has a chat template, and training none")
        return "no chat template"
    compared, refusal = 0, ""
    for turns, ask in itertools.product(_CONVERSATIONS, (False, True)):
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            ours, last = tokenizer.encode_chat(messages, ask), tokenizer.decode(tokenizer.encode(turns[-1][1]))
        except InputError as error:
            refusal = f" ({str(error).rstrip('.')})"
            continue
        try:
            theirs = reader.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
        except Exception as error:  # a template is a program, and may fail in any way
            raise VerificationError("tokenizer", f"transformers can not apply the chat template ({error})") from error
        _same(f"a conversation of {len(turns)} messages by the chat template", ours, theirs)
        if last.strip() not in tokenizer.decode(ours):
            raise VerificationError("tokenizer", f"the chat template leaves out what is said ({last!r})")
        compared += 1
    if not compared:
        raise VerificationError(
            "tokenizer", f"the chat template takes none of {len(_CONVERSATIONS)} conversations{refusal}"
        )
    return f"ids of {compared} conversations by the chat template"


def _same(what: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
    if list(ours) != list(theirs):
        raise VerificationError(
            "tokenizer", f"{what} is {_said(ours)} in training, and {_said(theirs)} by transformers"
        )


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
