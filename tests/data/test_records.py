"""Records of every format become the expected messages; tools and calls stay unchanged."""

import json
import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_recipe.data.columns import Columns
from sft_recipe.data.formats import read_conversations, to_conversation
from sft_recipe.data.messages import Message
from sft_recipe.data.pipeline import read_data
from sft_recipe.errors import ConfigError, DataError

Q, A = Message("user", "What is 2 + 2?"), Message("assistant", "4")
Q2, A2 = Message("user", "And 3 + 3?"), Message("assistant", "6")
ARGUMENTS = {"zeta": [1, 2.5, None, True], "alpha": {"deep": 'a "quoted"\nline', "好": ""}}
CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
CALLING = Message("assistant", "", tool_calls=(CALL,))
RESULT = Message("tool", '{"sum": 4}')
BARE_SCHEMA = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "default": None, "required": []}}
SCHEMA = {"type": "function", "function": BARE_SCHEMA}

SHAREGPT = [
    {"from": "human", "value": Q.content},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": RESULT.content},
    {"from": "gpt", "value": A.content},
]
OPENAI = [
    {"role": "user", "content": Q.content},
    {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c1"}]},
    {"role": "tool", "content": RESULT.content, "tool_call_id": "c1"},
    {"role": "assistant", "content": A.content, "reasoning_content": "Easy."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = [OPENAI[0], {"role": "assistant", "content": "4"}]
PAIR2 = [{"role": "user", "content": Q2.content}, {"role": "assistant", "content": "6"}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "value": "2 + 2?"}]},
    {"role": "assistant", "content": [{"type": "tool_call", "value": CALL["function"]}]},
    {"role": "tool", "content": [{"type": "tool_result", "value": {"sum": 4}, "name": "add"}]},
    {"role": "assistant", "content": [{"type": "reasoning", "text": "Easy."}, {"type": "text", "text": "4"}]},
]
THOUGHT = Message("assistant", "4", reasoning="Easy.")
TEXT = {"type": "text", "text": "4"}
BY_PARTS = {"role": "assistant", "content": [TEXT]}
PARTS_RESULT = {**OPENAI[2], "content": [TEXT], "name": "add"}
HASTY_CALL = {"role": "tool_call", "content": CALL["function"], "reasoning": "Easy."}
LLAMA_CALL = {"name": "add", "parameters": ARGUMENTS}
ADDING = Message("assistant", "4", reasoning="Easy.", tool_calls=(CALL,))
HASTY = Message("assistant", "", reasoning="Easy.", tool_calls=(CALL,))
CALLED = (
    Q,
    Message("assistant", "", tool_calls=({"id": "c1", **CALL},)),
    Message("tool", RESULT.content, tool_call_id="c1"),
    THOUGHT,
)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": SHAREGPT}, (Q, CALLING, RESULT, A)),
        ({"conversations": json.dumps(SHAREGPT)}, (Q, CALLING, RESULT, A)),
        ({"messages": OPENAI}, CALLED),
        ({"messages": PARTS}, (Q, CALLING, Message("tool", RESULT.content, name="add"), THOUGHT)),
        ({"query": Q2.content, "response": "6", "history": [[Q.content, "4"]]}, (Q, A, Q2, A2)),
        ({"instruction": Q2.content, "output": "6", "history": [[Q.content, "4"]]}, (Q, A, Q2, A2)),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, (Message("user", "Add.\n\n2, 2"), A)),
        (
            {"instruction": Q.content, "output": "4", "system": "Be brief.", "history": []},
            (Message("system", "Be brief."), Q, A),
        ),
        ({"prompt": Q.content, "completion": "4"}, (Q, A)),
        ({"prompt": [OPENAI[0]], "completion": [{"role": "assistant", "content": "4"}]}, (Q, A)),
        ({"prompt": Q.content, "chosen": "4", "rejected": "5"}, (Q, A)),
        ({"prompt": [OPENAI[0]], "chosen": [{"role": "assistant", "content": "4"}], "rejected": []}, (Q, A)),
        ({"prompt": Q.content, "chosen": [OPENAI[0], {"role": "assistant", "content": "4"}]}, (Q, A)),
        ({"chosen": [OPENAI[0], {"role": "assistant", "content": "4"}], "rejected": "5"}, (Q, A)),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[3], "rejected": SHAREGPT[3]}, (Q, A)),
        ({"instruction": Q.content, "input": "", "chosen": "4", "rejected": "5"}, (Q, A)),
        ({"prompt": Q.content, "messages": PAIR, "chosen": PAIR, "rejected": PAIR}, (Q, A)),
        ({"messages": PAIR, "chosen": "4", "rejected": "5"}, (Q, A)),
        ({"messages": [*PAIR, *PAIR2], "chosen": PAIR, "rejected": []}, (Q, A, Q2, A2)),
        ({"messages": [*PAIR, PAIR[0]], "chosen": PAIR, "rejected": []}, (Q, A, Q, A)),
        ({"messages": [SYSTEM, PAIR[0]], "chosen": PAIR, "rejected": []}, (Message("system", "Be brief."), Q, A)),
        ({"instruction": Q.content, "chosen": PAIR, "rejected": []}, (Q, A)),
        ({"instruction": Q2.content, "history": [[Q.content, "4"]], "output": [*PAIR, *PAIR2]}, (Q, A, Q2, A2)),
        ({"query": Q2.content, "history": [[Q.content, "4"]], "response": PAIR2}, (Q, A, Q2, A2)),
        ({"query": Q.content, "history": [[Q.content, "4"]], "response": "4"}, (Q, A, Q, A)),
        ({"prompt": PAIR[:1], "completion": PAIR}, (Q, A)),
        ({"prompt": [*PAIR, PAIR2[0]], "completion": [*PAIR, *PAIR2]}, (Q, A, Q2, A2)),
        ({"messages": [SYSTEM, *PAIR], "system": "Be brief."}, (Message("system", "Be brief."), Q, A)),
        (
            {"messages": [OPENAI[0], {"role": "assistant", "content": "", "function_call": CALL["function"]}]},
            (Q, CALLING),
        ),
        ({"messages": [OPENAI[0], {**BY_PARTS, "tool_calls": [CALL], "thinking": "Easy."}]}, (Q, ADDING)),
        (
            {"messages": [OPENAI[0], {"role": "tool_call", "content": CALL["function"], "reasoning": "Easy."}]},
            (Q, HASTY),
        ),
        (
            {
                "messages": [
                    OPENAI[0],
                    {**OPENAI[1], "content": []},
                    {**OPENAI[2], "content": [TEXT], "name": "add"},
                    PAIR[1],
                ]
            },
            (Q, CALLED[1], Message("tool", "4", name="add", tool_call_id="c1"), A),
        ),
        ({"messages": [OPENAI[0], {"role": "assistant", "tool_calls": [LLAMA_CALL]}]}, (Q, CALLING)),
        ({"prompt": Q.content, "response": "4", "reasoning_content": "Easy."}, (Q, THOUGHT)),
        ({"instruction": Q.content, "output": "4", "thinking": "Easy.", "reasoning": ""}, (Q, THOUGHT)),
        ({"prompt": Q.content, "response": "4", "system_prompt": "Be brief."}, (Message("system", "Be brief."), Q, A)),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, OPENAI[0], {"role": "model", "content": "4"}]},
            (Message("system", "Be brief."), Q, A),
        ),
        (
            {"messages": [OPENAI[0], {"role": "assistant", "content": "4", "weight": 0}, *OPENAI[:1], OPENAI[3]]},
            (Q, Message("assistant", "4", train=False), Q, THOUGHT),
        ),
        (
            {"messages": [OPENAI[0], {"role": "assistant", "content": "4", "train": False, "weight": None}]},
            (Q, Message("assistant", "4", train=False)),
        ),
        (
            {"messages": [OPENAI[0], {"role": "assistant", "content": "4", "train": True, "weight": 1.0}]},
            (Q, A),
        ),
    ],
)
def test_records_become_messages(record, messages):
    assert to_conversation(record, "").messages == messages


def sharegpt(*turns):
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


CALL_TEXT, OTHER = json.dumps(CALL["function"]), {"type": "function", "function": {"name": "sub", "arguments": {}}}


@pytest.mark.parametrize(
    ("turns", "messages"),
    [
        (
            [("gpt", "Let me add."), ("function_call", CALL_TEXT)],
            [Message("assistant", "Let me add.", tool_calls=(CALL,))],
        ),
        ([("gpt", ""), ("function_call", CALL_TEXT)], [CALLING]),
        (
            [("function_call", CALL_TEXT), ("function_call", '{"name": "sub"}')],
            [replace(CALLING, tool_calls=(CALL, OTHER))],
        ),
        (
            [("function_call", CALL_TEXT), ("observation", RESULT.content), ("function_call", CALL_TEXT)],
            [CALLING, RESULT, CALLING],
        ),
        ([("function_call", CALL_TEXT), ("gpt", "4")], [CALLING, A]),
    ],
)
def test_call_after_the_assistants_text_is_in_the_same_turn(turns, messages):
    assert to_conversation(sharegpt(("human", Q.content), *turns), "").messages == (Q, *messages)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "train",
            False,
            "conversations[1] continues the assistant's turn before it, but only one of them is trained on",
        ),
        ("reasoning", "hm", "conversations[1] has reasoning after the text of the same turn"),
    ],
)
def test_call_that_cannot_continue_the_turn_is_an_error(key, value, expected):
    record = sharegpt(("gpt", "Let me add."), ("function_call", CALL_TEXT))
    record["conversations"][1][key] = value
    with pytest.raises(DataError, match=re.escape(expected)):
        to_conversation(record, "")


@pytest.mark.parametrize("key", ["train", "weight", "loss_weight", "loss", "trainable", "loss_mask", "mask"])
@pytest.mark.parametrize(("value", "is_trained"), [(True, True), (1, True), (1.0, True), (False, False), (0, False)])
def test_loss_switches_mean_the_same(key, value, is_trained):
    record = {"messages": [OPENAI[0], {"role": "assistant", "content": "4", key: value}]}
    assert to_conversation(record, "").messages == (Q, Message("assistant", "4", train=is_trained))


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([BARE_SCHEMA])])
def test_tools_in_the_system_turn_are_tools_of_the_conversation(key, tools):
    record = {"messages": [{**SYSTEM, key: tools}, *PAIR]}
    assert json.dumps(to_conversation(record, "").tools) == json.dumps([SCHEMA])
    assert to_conversation({**record, "tools": [SCHEMA]}, "") == to_conversation(record, "")
    assert to_conversation({"messages": [SYSTEM, *PAIR], key: tools}, "") == to_conversation(record, "")
    without_content = to_conversation({"messages": [{"role": "system", key: tools}, *PAIR]}, "")
    assert without_content.messages == (Message("system", ""), Q, A) and without_content.tools == (SCHEMA,)


EMPTY = [None, float("nan"), [], {}, ""]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("field", ["messages", "chosen", "history", "system", "tools", "images", "reasoning", "input"])
def test_empty_fields_of_a_record_are_as_good_as_missing(field, empty):
    alpaca = {"instruction": Q.content, "output": "4"}
    assert to_conversation({**alpaca, field: empty}, "").messages == (Q, A)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("keys", [["tool_calls", "name", "tool_call_id", "thinking", "tools"], ["from", "value"]])
def test_empty_keys_of_a_turn_are_as_good_as_missing(keys, empty):
    turns = [{**dict.fromkeys(keys, empty), **turn} for turn in [SYSTEM, *PAIR]]
    assert to_conversation({"messages": turns}, "").messages == (Message("system", "Be brief."), Q, A)


@pytest.mark.parametrize("null", [None, float("nan")])
def test_null_pair_beside_a_filled_one(null):
    turns = [{"role": null, "content": null, **turn} for turn in (SHAREGPT[0], SHAREGPT[3])]
    assert to_conversation({"conversations": turns}, "").messages == (Q, A)


@pytest.mark.parametrize("null", [None, float("nan")])
def test_null_switches_content_and_arguments(null):
    call = {"name": "add", "arguments": null, "id": null}
    turn = {"role": "assistant", "content": null, "tool_calls": [call], "train": null, "weight": null}
    (message,) = to_conversation({"messages": [turn]}, "").messages
    assert message == Message(
        "assistant", "", tool_calls=({"type": "function", "function": {"name": "add", "arguments": {}}},)
    )


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS), "", None, "{}"])
def test_tool_arguments_become_an_object_in_key_order(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    record = {"messages": [OPENAI[0], {"role": "assistant", "tool_calls": [call]}]}
    (found,) = to_conversation(record, "").messages[1].tool_calls
    expected = ARGUMENTS if arguments in (ARGUMENTS, json.dumps(ARGUMENTS)) else {}
    assert json.dumps(found["function"]["arguments"]) == json.dumps(expected)


@pytest.mark.parametrize("tools", [[SCHEMA], [BARE_SCHEMA], json.dumps([SCHEMA]), json.dumps([BARE_SCHEMA])])
def test_tool_schemas_are_unchanged(tools):
    """Keys in their order, null where it is written; a bare schema is given the wrapping that templates want."""
    found = to_conversation({"conversations": SHAREGPT, "tools": tools}, "").tools
    assert json.dumps(found) == json.dumps([SCHEMA])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_missing_keys_do_not_become_null(tmp_path, suffix):
    """Arrow gives every struct the keys of all; JSON is read as it is."""
    schemas = [
        {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
        {"name": "g", "parameters": {"type": "object", "properties": {"y": {"type": "number", "minimum": 0}}}},
    ]
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [schema]}
        for schema in schemas
    ]
    path = tmp_path / f"tools{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records)))
    found = [conversation.tools for conversation in read_conversations(path)]
    assert json.dumps(found) == json.dumps([[{"type": "function", "function": schema}] for schema in schemas])


def test_conversation_round_trips_as_record():
    record = {
        "messages": [*OPENAI, OPENAI[0], {"role": "assistant", "content": "4", "train": False}],
        "tools": [SCHEMA],
    }
    conversation = to_conversation(record, "")
    assert to_conversation(json.loads(json.dumps(conversation.as_record())), "") == conversation


def test_dicts_have_only_the_keys_of_the_turn():
    dicts = to_conversation({"messages": OPENAI}, "").as_dicts()
    assert [sorted(turn) for turn in dicts] == [
        ["content", "role"],
        ["content", "role", "tool_calls"],
        ["content", "role", "tool_call_id"],
        ["content", "reasoning_content", "role"],
    ]


def rows(tmp_path, *records):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_record_columns_are_renamed(tmp_path):
    path = rows(tmp_path, {"question": Q.content, "answer": "4", "prompt": "ignored"}, {"prompt": "a", "response": "b"})
    columns = Columns({"prompt": "question", "response": "answer"})
    found = [conversation.messages for conversation in read_data(path, columns=columns)]
    assert found == [(Q, A), (Message("user", "a"), Message("assistant", "b"))]
    columns.check_all_found()


def test_turn_columns_are_renamed(tmp_path):
    path = rows(tmp_path, {"dialog": [{"who": "user", "says": Q.content}, {"who": "assistant", "says": "4"}]})
    columns = Columns({"messages": "dialog", "role": "who", "content": "says"})
    assert [conversation.messages for conversation in read_data(path, columns=columns)] == [(Q, A)]
    columns.check_all_found()


def test_missing_column_is_reported(tmp_path):
    columns = Columns({"system": "sytsem"})
    assert len(list(read_data(rows(tmp_path, {"prompt": "a", "response": "b"}), columns=columns))) == 1
    with pytest.raises(DataError, match="system='sytsem', but no record has such a column"):
        columns.check_all_found()


def test_unknown_field_in_columns_is_reported():
    with pytest.raises(ConfigError, match="names 'respons', which no format has. Did you mean response?"):
        Columns({"respons": "answer"})
