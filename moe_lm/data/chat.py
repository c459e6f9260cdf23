"""Conversations: rows of chat data, and what makes one.

A row is {"messages": [{"role": …, "content": …}, …]}, or {"prompt": …, "completion": …}, which says the same: a prompt
that is a string is a user's message, a completion that is one the assistant's, and either may be a list of messages.
Other fields of a row are not rendered; of a message every string is, since templates ask for names and the like, and
what is no string is refused rather than left out in silence.

A checked conversation goes on as a document whose text is its messages as JSON, whatever the template: so the
fingerprint of a corpus, what is held out and how reading goes on are those of any other text.
"""

import enum
import json
from typing import Any

from moe_lm.data.documents import BadRows

Messages = list[dict[str, str]]


class Role(enum.Enum):
    """Who speaks."""

    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"


def read_conversation(fields: dict[str, Any], place: str, bad: BadRows) -> str | None:
    """The conversation of a row as JSON text; null, as a bad row, where the row is none.

    Args:
        fields: The row.
        place: File and line, for messages.
        bad: What to do about a row that is no conversation.

    Raises:
        InputError: It is none, and the policy is `error`.
    """
    found = _turns(fields, place, bad)
    if found is None:
        return None
    turns, num_asked = found
    if not turns:
        bad.found("no_messages", place, "the conversation has no message")
        return None
    messages: Messages = []
    for number, turn in enumerate(turns, 1):
        message = _message(turn, f"message {number}", place, bad)
        if message is None:
            return None
        messages.append(message)
    if all(message["role"] != Role.assistant.value for message in messages[num_asked:]):
        where = " of 'completion'" if num_asked else ""
        bad.found("no_assistant_turn", place, f"no message{where} is the assistant's, so there is nothing to learn")
        return None
    return json.dumps(messages, ensure_ascii=False)


def _turns(fields: dict[str, Any], place: str, bad: BadRows) -> tuple[list[Any], int] | None:
    """The messages of a row, not yet checked, and how many of them are its prompt."""
    if "messages" in fields:
        turns = fields["messages"]
        if "prompt" in fields and "completion" in fields:
            complaint = "has 'messages' as well as 'prompt' and 'completion', and either is a conversation"
            bad.found("ambiguous", place, complaint, "leave one of them out")
            return None
        if isinstance(turns, list):
            return turns, 0
        bad.found("wrong_type", place, f"'messages' must be a list, found {type(turns).__name__}")
        return None
    parts: list[list[Any]] = []
    for name, role in (("prompt", Role.user), ("completion", Role.assistant)):
        if name not in fields:
            there = ", ".join(sorted(fields)) or "none"
            complaint = f"neither 'messages' nor 'prompt' and 'completion' (its fields: {there})"
            bad.found("missing_field", place, complaint)
            return None
        part = fields[name]
        parts.append(part if isinstance(part, list) else [{"role": role.value, "content": part}])
    return parts[0] + parts[1], len(parts[0])


def _message(turn: Any, what: str, place: str, bad: BadRows) -> dict[str, str] | None:
    """A message as templates take it; null, as a bad row, for what is none."""
    if not isinstance(turn, dict):
        bad.found("wrong_type", place, f"{what} must be an object with role and content, found {type(turn).__name__}")
        return None
    message = {name: value for name, value in turn.items() if value is not None}
    if "role" not in message:
        bad.found("missing_field", place, f"{what} has no 'role'")
        return None
    if message["role"] not in [role.value for role in Role]:
        known = ", ".join(role.value for role in Role)
        bad.found("unknown_role", place, f"{what} has the role {message['role']!r}, which is none of {known}")
        return None
    if "tool_calls" in message:
        bad.found("tool_calls", place, f"{what} has 'tool_calls', which are not rendered", "remove them")
        return None
    if "content" not in message:
        bad.found("empty_content", place, f"{what} has no content")
        return None
    for name, value in message.items():
        if not bad.accept(name, place, f"a field's name in {what}") or not bad.accept(
            value, place, f"{what}: '{name}'"
        ):
            return None
    if not message["content"].strip():
        bad.found("empty_content", place, f"{what} has an empty content")
        return None
    return message
