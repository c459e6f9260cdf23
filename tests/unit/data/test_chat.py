"""Catches: a row that is no conversation but is trained on, or is refused without saying where and why."""

import json
from typing import Any

import pytest

from moe_lm.data.chat import read_conversation
from moe_lm.data.config import OnBadRow
from moe_lm.data.documents import BadRows
from moe_lm.errors import InputError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}

BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "no_messages", "has no message"),
    ({"messages": None}, "wrong_type", "'messages' must be a list, found NoneType"),
    ({"messages": "hi"}, "wrong_type", "must be a list, found str"),
    ({"messages": ["hi"]}, "wrong_type", "message 1 must be an object with role and content, found str"),
    ({"messages": [USER]}, "no_assistant_turn", "no message is the assistant's"),
    ({"messages": [USER, {"role": "bot", "content": "x"}]}, "unknown_role", "message 2 has the role 'bot'"),
    ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "unknown_role", "message 1 has the role"),
    ({"messages": [{"content": "x"}, ANSWER]}, "missing_field", "message 1 has no 'role'"),
    ({"messages": [USER, {"role": "assistant"}]}, "empty_content", "message 2 has no content"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "empty_content", "message 2 has no content"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_content", "message 2 has an empty content"),
    ({"messages": [{"role": "user", "content": ["x"]}, ANSWER]}, "wrong_type", "message 1: 'content' must be a string"),
    ({"messages": [{"role": "user", "content": "a\0"}, ANSWER]}, "nul", "holds a NUL at character 1"),
    ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "lone_surrogate", "message 1: 'content' holds"),
    ({"messages": [USER, {**ANSWER, "tool_calls": []}]}, "tool_calls", "message 2 has 'tool_calls', .*; remove them"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [1]}, ANSWER]},
        "tool_calls",
        "message 2 has 'tool_calls'",
    ),
    (
        {"messages": [USER, ANSWER], "prompt": "hi", "completion": "hello"},
        "ambiguous",
        "'messages' as well as 'prompt' and 'completion'",
    ),
    ({"prompt": [ANSWER], "completion": [USER]}, "no_assistant_turn", "no message of 'completion' is the assistant's"),
    ({"prompt": [ANSWER], "completion": []}, "no_assistant_turn", "no message of 'completion' is the assistant's"),
    ({"prompt": "hi"}, "missing_field", "neither 'messages' nor 'prompt' and 'completion'"),
    ({"text": "hi"}, "missing_field", r"\(its fields: text\)"),
    ({"prompt": "hi", "completion": ""}, "empty_content", "message 2 has an empty content"),
    ({"prompt": 3, "completion": "x"}, "wrong_type", "message 1: 'content' must be a string, found int"),
]


@pytest.mark.parametrize(("row", "kind", "complaint"), BAD_ROWS)
def test_a_bad_row_is_named_or_counted(row: dict[str, Any], kind: str, complaint: str) -> None:
    with pytest.raises(InputError, match=rf"^data.paths: a.jsonl, line 7: .*{complaint}.*data.on_bad_row=skip.$"):
        read_conversation(row, "a.jsonl, line 7", BadRows(OnBadRow.error, "data.paths"))
    lenient = BadRows(OnBadRow.skip, "data.paths")
    assert read_conversation(row, "a.jsonl, line 7", lenient) is None
    assert lenient.skipped == {kind: 1}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [USER, ANSWER], "source": 3}, [USER, ANSWER]),
        ({"messages": [ANSWER, USER]}, [ANSWER, USER]),  # the assistant may begin, and need not have the last word
        ({"messages": [{**USER, "name": "Ann", "tool_calls": None}, ANSWER]}, [{**USER, "name": "Ann"}, ANSWER]),
        ({"prompt": "hi", "completion": "hello"}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": "hello"}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": "hi", "messages": [USER, ANSWER]}, [USER, ANSWER]),  # as ultrachat has it
    ],
)
def test_both_forms_of_a_row_are_read(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Catches a form that is refused, or a message that is lost or changed."""
    text = read_conversation(row, "", BadRows(OnBadRow.error))
    assert text is not None and json.loads(text) == messages
