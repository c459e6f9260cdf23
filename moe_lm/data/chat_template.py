"""Chat templates: from a conversation to token ids, and to which of them are the assistant's.

A template is Jinja text, rendered by transformers' own code (sandboxed, without access to anything but the messages),
so that a model is trained on exactly the ids that `tokenizer.apply_chat_template` gives where it is used later.

What the assistant says, and its end mark, is what is learned. A template says where that is by `{% generation %}` …
`{% endgeneration %}`. Of one without these marks it is found by rendering: what message i adds to the rendered messages
before it, asked for an answer (`add_generation_prompt`), is what the assistant has to say. That holds only where
earlier text does not change as the conversation goes on, which is checked.

Control strings inside a message ("<|user|>", "</s>") would be read as marks. So each is broken before rendering, behind
its first character, by a noncharacter of Unicode that the conversation does not hold, and the tokenizer puts it
together again as text (`tokenizer_rendered.py`).
"""

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_lm.data.chat import Messages, Role
from moe_lm.data.config import TooLong
from moe_lm.errors import InputError, in_one_line

if TYPE_CHECKING:  # tokenizers of both kinds are built on this module
    from moe_lm.data.tokenizer import Tokenizer

ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
"""Control symbols of the tokenizers that moe-lm trains."""

DEFAULT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}{{- message['content'] + eos_token }}{% endgeneration %}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
"""For tokenizers that moe-lm trained: a role mark in front of each message, and behind it the end mark of a turn;
behind the assistant's, the end mark of documents, which is where generation stops."""

NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that are no characters, for a program's own use."""

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become documents of tokens."""

    template: str
    sequence_length: int
    too_long: TooLong
    file: str | None = None
    """Where the user gave the template; null for the tokenizer's own, or the default."""


class ChatTokens(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """[begin, end) of the assistant's tokens, their end marks included."""
    num_bytes: int
    """UTF-8 bytes of what the assistant says."""


class Refusal(NamedTuple):
    """Why a conversation can not be trained on."""

    kind: str
    complaint: str
    of_template: bool = False
    """Whether the fault may be the template's."""


def choose_template(tokenizer: "Tokenizer", path: str | None) -> str:
    """The template that is asked for: a file's, or else the tokenizer's own, or else `DEFAULT_TEMPLATE`.

    Raises:
        InputError: The file can not be read, the template is not valid, or the tokenizer has neither a template nor the
            role marks of the default.
    """
    if path is not None:
        option, template = f"data.chat_template={path}", _read(path)
    elif tokenizer.chat_template is not None:
        option, template = "the tokenizer", tokenizer.chat_template
    elif _has_role_marks(tokenizer):
        return DEFAULT_TEMPLATE
    else:
        raise InputError(
            "data.chat_template=null: the tokenizer has no chat template, and not the role marks of moe-lm's own "
            "(<|user|> …); give a template's file."
        )
    try:
        _render(template, [{"role": "user", "content": "a"}], {})
    except Exception as error:  # whatever the template does: this is only about what it is
        import jinja2

        if isinstance(error, jinja2.TemplateSyntaxError):
            raise InputError(
                f"{option}: line {error.lineno} of the chat template is not valid ({error.message})."
            ) from None
    return template


def encode_conversation(tokenizer: "Tokenizer", messages: Messages, form: ChatFormat) -> ChatTokens | Refusal:
    """Renders and encodes a conversation, or says why it can not be trained on."""
    breaker = _breaker(messages)
    if breaker is None:
        return Refusal("noncharacters", "holds every noncharacter from U+FDD0 to U+FDEF")
    try:
        text, spans = render(form.template, _broken(messages, tokenizer, breaker), tokenizer.special_tokens)
    except Exception as error:  # a template is a program, and may fail in any way
        return Refusal("template_failed", f"the chat template fails ({in_one_line(error)})", of_template=True)
    if spans is None:
        return Refusal(
            "unstable_template",
            "the chat template changes earlier text as the conversation goes on, so what the assistant adds is not "
            "known; mark it by {% generation %} … {% endgeneration %} in the template",
            of_template=True,
        )
    ids, token_spans = tokenizer.encode_rendered(text, breaker, spans)
    room = form.sequence_length + 1  # the last token is no input
    num_bytes = sum(len(message["content"].encode()) for message in messages if message["role"] == Role.assistant.value)
    if len(ids) > room:
        if form.too_long is not TooLong.cut:
            return Refusal(
                "too_long",
                f"the conversation has {len(ids)} tokens, and data.sequence_length={form.sequence_length} has room for "
                f"{room}; give a sequence length of at least {len(ids) - 1}, or data.too_long=skip or cut",
            )
        ids = ids[:room]
    # Nothing predicts the first token.
    token_spans = [(max(1, begin), min(end, len(ids))) for begin, end in token_spans]
    token_spans = [(begin, end) for begin, end in token_spans if begin < end]
    if not token_spans and len(ids) == room:
        return Refusal(
            "too_long", f"nothing of the assistant is left within data.sequence_length={form.sequence_length}"
        )
    if not token_spans:
        return Refusal("no_assistant_turn", "the chat template writes nothing as the assistant's", of_template=True)
    if len(ids) == room:  # perhaps cut
        num_bytes = min(num_bytes, sum(len(tokenizer.decode(ids[begin:end]).encode()) for begin, end in token_spans))
    return ChatTokens(ids, token_spans, num_bytes)


def encode_prompt(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """A user's message as the beginning of a conversation that the assistant goes on with.

    Raises:
        InputError: The tokenizer has no template that can be used, or the template fails.
    """
    if tokenizer.chat_template is None and not _has_role_marks(tokenizer):
        raise InputError(
            "chat=true: the model's tokenizer has no chat template, and not the role marks of moe-lm's own (<|user|> "
            "…); leave it out, or give a model that was fine-tuned on chat data."
        )
    return encode_chat(tokenizer, [{"role": Role.user.value, "content": prompt}], ask=True)


def encode_chat(tokenizer: "Tokenizer", messages: Messages, ask: bool) -> list[int]:
    """A conversation by the tokenizer's own template.

    Args:
        tokenizer: Has a template, or the role marks of the default one.
        messages: The conversation.
        ask: Whether the assistant is to go on.

    Raises:
        InputError: The template can not be used, or fails.
    """
    template = choose_template(tokenizer, None)
    breaker = _breaker(messages)
    if breaker is None:
        raise InputError("prompt: holds every noncharacter from U+FDD0 to U+FDEF; leave one of them out.")
    try:
        text, _ = _render(template, _broken(messages, tokenizer, breaker), tokenizer.special_tokens, ask)
    except Exception as error:  # a template is a program, and may fail in any way
        raise InputError(f"checkpoint: the chat template of its tokenizer fails ({in_one_line(error)}).") from None
    return tokenizer.encode_rendered(text, breaker, [])[0]


def end_ids(tokenizer: "Tokenizer") -> list[int]:
    """Ids that end a text: the tokenizer's end mark, and the first mark that its chat template writes behind an answer,
    where that is another.
    """
    messages = [{"role": Role.user.value, "content": "a"}, {"role": Role.assistant.value, "content": "b"}]
    if tokenizer.chat_template is None:
        return [tokenizer.eos_id]  # the default template ends with it
    try:
        text, spans = render(tokenizer.chat_template, messages, tokenizer.special_tokens)
    except Exception:  # a template is a program, and may fail in any way
        return [tokenizer.eos_id]
    ids, token_spans = tokenizer.encode_rendered(text, NONCHARACTERS[0], spans or [])
    pieces = set(tokenizer.generated_ids) - {tokenizer.eos_id}
    unknown = tokenizer.special_tokens.get("unk_token")
    others = set() if unknown is None else set(tokenizer.encode_rendered(unknown, NONCHARACTERS[0], [])[0])
    answered = ids[token_spans[-1][0] :] if token_spans else []  # the mark itself may be none of what is learned
    said = itertools.dropwhile(lambda token: token not in pieces, answered)
    marks = (token for token in said if token not in pieces and token not in others)
    return list(dict.fromkeys([tokenizer.eos_id, *itertools.islice(marks, 1)]))


def render(
    template: str, messages: Messages, special_tokens: dict[str, str]
) -> tuple[str, list[tuple[int, int]] | None]:
    """Renders a conversation.

    Args:
        template: Jinja text.
        messages: The conversation.
        special_tokens: `bos_token`, `eos_token` …, for the template.

    Returns:
        The text, and the parts [begin, end) of it, in characters, that are the assistant's; null where a template
        without marks does not let them be found.

    Raises:
        Exception: The template fails, in whichever way.
    """
    text, spans = _render(template, messages, special_tokens)
    if GENERATION.search(template):
        return text, spans
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == Role.assistant.value:
            before, _ = _render(template, messages[:number], special_tokens, ask=True)
            behind, _ = _render(template, messages[: number + 1], special_tokens)
            if not (behind.startswith(before) and text.startswith(behind)):
                return text, None
            spans.append((len(before), len(behind)))
    return text, spans


def _render(
    template: str, messages: Messages, special_tokens: dict[str, str], ask: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Text and marked parts of it, rendered by transformers; `ask` for an answer to come."""
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = GENERATION.search(template) is not None
    texts, spans = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=ask,
        **special_tokens,
    )
    return texts[0], spans[0] if marked else []


def _has_role_marks(tokenizer: "Tokenizer") -> bool:
    return set(ROLE_MARKS) <= set(tokenizer.control_strings)


def _breaker(messages: Messages) -> str | None:
    """A noncharacter that no message holds."""
    text = "".join(value for message in messages for value in message.values())
    if text.isascii():
        return NONCHARACTERS[0]
    return next((char for char in NONCHARACTERS if char not in text), None)


def _broken(messages: Messages, tokenizer: "Tokenizer", breaker: str) -> Messages:
    """The messages with their control strings broken."""
    begins = _begins(tuple(tokenizer.control_strings))
    return [
        {name: value if name == "role" else begins.sub(rf"\1{breaker}", value) for name, value in message.items()}
        for message in messages
    ]


@functools.cache
def _begins(strings: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the first character of control strings, at every place where one begins: two may share characters."""
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, strings)) or '(?!)'}))(.)", re.DOTALL)


def _read(path: str) -> str:
    """The text of a template's file."""
    try:
        return Path(path).expanduser().read_bytes().decode()
    except OSError as error:
        raise InputError(f"data.chat_template={path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"data.chat_template={path}: is not UTF-8 text (byte {error.start}).") from None
