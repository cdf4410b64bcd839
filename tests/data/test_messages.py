"""Conversation accepts what can be trained on, as it is, and names what cannot."""

import dataclasses
import json
from datetime import date, datetime
from decimal import Decimal

import pytest

from sft_recipe.data.formats import to_conversation
from sft_recipe.data.messages import Conversation, Message
from sft_recipe.errors import DataError


def build(*turns, source="data.json, record 12", fields=()):
    return Conversation(tuple(Message(role, content) for role, content in turns), source, fields=fields)


def error_of(*turns, **kwargs):
    with pytest.raises(DataError) as caught:
        build(*turns, **kwargs)
    return str(caught.value)


USER, ANSWER = ("user", "Hi"), ("assistant", "Hello.")


@pytest.mark.parametrize(
    "turns",
    [
        [USER, ANSWER],
        [("system", "Be kind."), USER, ANSWER, USER, ANSWER],
        [("system", ""), USER, ANSWER],
        [("system", "a"), USER, ANSWER, ("system", "b"), USER, ANSWER],
        [USER, ("system", "a"), ANSWER],
        [USER, USER, ANSWER],
        [USER, ANSWER, USER],
        [ANSWER],
    ],
)
def test_valid_conversations_become_the_dicts_a_chat_template_wants(turns):
    assert build(*turns).as_dicts() == [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    "text", ["  two spaces  ", "\n\ttab\r\n", "你好，世界", "👩‍🚀🎉", "\"quoted\" 'so'", "\u2028\ufeff"]
)
def test_content_is_kept_exactly(text):
    dicts = build(("system", text), ("user", text + "?"), ("assistant", text + "!")).as_dicts()
    assert [turn["content"] for turn in dicts] == [text, text + "?", text + "!"]


def test_frozen_and_equal_wherever_it_came_from():
    one, other = build(USER, ANSWER, source="a.json, record 1"), build(USER, ANSWER, source="b.csv, line 9")
    assert one == other and hash(one) == hash(other)
    assert one != build(USER, ("assistant", "Hello"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.source = "c"
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.messages[0].content = "c"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([USER, ("bot", "x")], "messages[1].role is 'bot'; expected system, user, assistant or tool; data.roles maps"),
        ([USER, (None, "x")], "messages[1].role is null; expected system, user, assistant or tool"),
        ([USER, (["user"], "x")], "messages[1].role is a list"),
        ([USER, ("assistant", None)], "messages[1].content is null; expected text"),
        ([("user", 7), ANSWER], "messages[0].content is a number; expected text"),
        ([("user", 0.5), ANSWER], "messages[0].content is a number"),
        ([("user", True), ANSWER], "messages[0].content is true or false"),
        ([("user", ["a"]), ANSWER], "messages[0].content is a list"),
        ([("user", {"a": 1}), ANSWER], "messages[0].content is an object"),
        ([("user", b"a"), ANSWER], "messages[0].content is bytes"),
        ([USER, ("assistant", "")], "messages[1].content is an empty response"),
        ([USER, ("assistant", " \n\t\u3000")], "messages[1].content is an empty response"),
        ([USER, ANSWER, ("user", " ")], "messages[2].content is an empty prompt"),
        ([("system", "a"), ("system", "b"), USER, ANSWER], "messages[1].role is a second system turn in a row"),
        ([USER, USER], "messages has no assistant turn"),
        ([], "messages has no assistant turn"),
        ([("user", "half \ud83d"), ANSWER], r"messages[0].content contains \ud83d, half of a character"),
    ],
)
def test_what_cannot_be_trained_on_is_named(turns, expected):
    message = error_of(*turns)
    assert message.startswith("data.json, record 12: ")
    assert expected in message


def test_error_without_a_source_begins_with_the_field():
    assert error_of(USER, source="").startswith("messages has no assistant turn")


def test_errors_use_the_names_of_the_record():
    assert "output is an empty response" in error_of(USER, ("assistant", ""), fields=["instruction", "output"])
    fields = ["system", "turns[0].content", "turns[1].content"]
    assert "turns[1].role is 'x'" in error_of(("system", "s"), USER, ("x", "y"), fields=fields)
    assert "turns has no assistant turn" in error_of(("system", "s"), USER, USER, fields=fields)


NOT_JSON = ["1e999", "-1e999", "Infinity", "-Infinity", "NaN", '[1, {"y": [NaN]}]']
ASKED = {"role": "user", "content": "Hi"}


def record_with(place, value):
    """A record as it is read from a file in which this value is written so."""
    call = {"name": "f", "arguments": {"x": value}}
    schema = {"type": "function", "function": {"name": "f", "parameters": {"maximum": value}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    result = {"role": "user", "content": [{"type": "tool_result", "text": {"x": value}}]}
    answer = {"role": "assistant", "content": "Yes."}
    return {
        "arguments": {"messages": [ASKED, calls]},
        "arguments as text": {
            "messages": [ASKED, {**calls, "tool_calls": [call | {"arguments": f'{{"x": {value}}}'}]}]
        },
        "tools": {"messages": [ASKED, answer], "tools": [schema]},
        "result": {"messages": [ASKED, calls | {"tool_calls": [{"name": "f", "arguments": {}}]}, result, answer]},
        "variables": {"messages": [ASKED, answer], "chat_template_kwargs": {"x": [value]}},
    }[place]


@pytest.mark.parametrize("value", [date(2026, 1, 2), datetime(2026, 1, 2), Decimal("1.5"), b"x"])
@pytest.mark.parametrize("place", ["arguments", "tools", "result", "variables"])
def test_a_value_of_parquet_that_json_does_not_have_is_refused(place, value):
    expected = f"has a value of type {type(value).__name__}, which JSON does not have; write it as text"
    with pytest.raises(DataError, match=expected):
        to_conversation(record_with(place, value), "a.parquet, record 1")


@pytest.mark.parametrize("number", NOT_JSON)
@pytest.mark.parametrize(
    ("place", "field"),
    [
        ("arguments", "messages[1].tool_calls"),
        ("arguments as text", "messages[1].tool_calls"),
        ("tools", "tools"),
        ("result", "messages[2].content[0].text"),
        ("variables", "chat_template_kwargs"),
    ],
)
def test_a_number_that_json_does_not_have_is_refused(place, field, number):
    value = number if place == "arguments as text" else json.loads(number)
    with pytest.raises(DataError) as error:
        to_conversation(record_with(place, value), "a.jsonl, line 3")
    assert str(error.value).startswith(f"a.jsonl, line 3: {field} has a number that JSON does not have")
    to_conversation(record_with(place, "1e308" if place == "arguments as text" else 1e308), "")
