"""Encodes what a chat template rendered: its control strings become control ids, those inside a message stay text.

Before rendering, every control string inside a message was broken by a character that no message holds
(`chat_template.py`). So a control string that is whole was written by the template, and the text between two of them is
encoded as text, with the breaking character taken out: the ids are those that the text has anywhere else.

transformers does the same for a tokenizer.json with `apply_chat_template`, and the ids are equal (tested) where no
message holds a control string. A model with a dummy prefix (Mixtral's own) begins every such text with a space, there
as here. Where a message holds one, transformers' `sanitize_control_tokens=True` cuts the text at its edges; here it is
not cut.
"""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from moe_lm.data.tokenizer_files import SPACE

if TYPE_CHECKING:  # which is built on this module
    from moe_lm.data.tokenizer_sentencepiece import SentencePieceTokenizer

Spans = list[tuple[int, int]]
"""[begin, end) of characters or of tokens, in order."""


def encode_rendered(
    tokenizer: "SentencePieceTokenizer", text: str, breaker: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], Spans]:
    """Encodes a rendered conversation with a sentencepiece model; see `Tokenizer.encode_rendered`."""
    # Control strings and the texts between them, in turn; each with its place.
    pieces: list[tuple[int, int]] = []
    behind = 0
    for match in tokenizer.control_pattern.finditer(text):
        pieces += [(behind, match.start()), match.span()]
        behind = match.end()
    pieces.append((behind, len(text)))
    # One by one: for texts as short as these sentencepiece's batches take four times as long.
    texts = [tokenizer.encode(text[begin:end].replace(breaker, "")) for begin, end in pieces[::2]]
    ids: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    bounds = {bound for span in spans for bound in span}
    for number, (begin, end) in enumerate(pieces):
        new = [tokenizer.token_id(text[begin:end])] if number % 2 else texts[number // 2]
        ids += new
        if number % 2 == 0 and any(begin < bound < end for bound in bounds):
            inner = _places(tokenizer, new, text[begin:end], breaker)
            begins += [begin + first for first, _ in inner]
            ends += [begin + last for _, last in inner]
        else:  # no bound lies inside, so where each of its tokens is does not matter
            begins += [begin] * len(new)
            ends += [end] * len(new)
    return ids, token_spans(begins, ends, spans)


def token_spans(begins: Sequence[int], ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> Spans:
    """Spans of characters as spans of the tokens that hold any of them; what holds none is left out.

    Args:
        begins: First character of each token, ascending.
        ends: Behind the last character of each token, ascending.
        spans: In characters.
    """
    found = ((bisect.bisect_right(ends, begin), bisect.bisect_left(begins, end)) for begin, end in spans if begin < end)
    return [(first, last) for first, last in found if first < last]


def _places(tokenizer: "SentencePieceTokenizer", ids: list[int], text: str, breaker: str) -> Spans:
    """Characters [begin, end) of each token of a text; a token that is a part of a character has all of it."""
    # The model reads a U+2581 of the text as a space, too.
    read = text.replace(SPACE, " ")
    behind_character = [0, *accumulate(0 if char == breaker else len(char.encode()) for char in read)]
    sizes = (1 if tokenizer.is_byte(i) else len(tokenizer.piece(i).replace(SPACE, " ").encode()) for i in ids)
    places = []
    end = -1 if tokenizer.has_dummy_prefix else 0
    for size in sizes:
        begin, end = end, end + size
        first = bisect.bisect_right(behind_character, max(0, begin)) - 1
        places.append((first, bisect.bisect_left(behind_character, end)))
    return places
