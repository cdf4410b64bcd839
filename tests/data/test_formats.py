"""Every format in every file type is read byte for byte; errors of bad records name position and field."""

import json
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipe.config.schema import DataConfig
from sft_recipe.data.formats import FORMATS, read_conversations
from sft_recipe.errors import DataError
from tests.data.files import DICTS, GOOD, RECORDS, SUFFIXES, TURNS, error_of, raw, turns_of, write


@pytest.mark.parametrize("format", ["auto", "own"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", RECORDS)
def test_every_format_in_every_file_type_keeps_every_byte(tmp_path, name, suffix, format):
    path = write(tmp_path / f"data{suffix}", [RECORDS[name]] * 3)
    assert turns_of(path, name if format == "own" else "auto") == [TURNS] * 3


def test_configuration_names_all_formats():
    assert {"auto", *FORMATS} == set(get_args(DataConfig.model_fields["format"].annotation))


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        (".json", ["record 1", "record 2"]),
        (".jsonl", ["line 1", "line 2"]),
        (".parquet", ["record 1", "record 2"]),
        (".csv", ["line 2", "line 5"]),
    ],
)
def test_source_names_file_and_position(tmp_path, suffix, places):
    path = write(tmp_path / f"data{suffix}", [{"prompt": "a\nb\nc", "response": "d"}, GOOD])
    assert [c.source for c in read_conversations(path)] == [f"{path}, {place}" for place in places]


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
roles = st.sampled_from(["user", "assistant"])
dialogues = st.lists(st.tuples(roles, text), min_size=1, max_size=5).map(lambda t: [*t, ("assistant", "end")])


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40)
@given(data=st.data())
def test_round_trip(suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        chats = data.draw(st.lists(dialogues, min_size=1, max_size=4))
        records = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
        assert turns_of(write(Path(folder, f"chats{suffix}"), records)) == chats
        pairs = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=4))
        records = [{"prompt": prompt, "response": response} for prompt, response in pairs]
        expected = [[("user", prompt), ("assistant", response)] for prompt, response in pairs]
        assert turns_of(write(Path(folder, f"pairs{suffix}"), records)) == expected


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"instruction": " Do ", "input": " this "}, " Do \n\n this "),
        ({"instruction": " Do ", "input": " \n"}, " Do "),
        ({"instruction": " Do ", "input": None}, " Do "),
        ({"instruction": " Do "}, " Do "),
        ({"instruction": "", "input": " this "}, " this "),
    ],
)
def test_alpaca_prompt(tmp_path, fields, prompt):
    path = write(tmp_path / "a.json", [{**fields, "output": "Done"}])
    assert turns_of(path) == [[("user", prompt), ("assistant", "Done")]]


@pytest.mark.parametrize("system", [None, "", " \n"])
@pytest.mark.parametrize("name", ["prompt_response", "alpaca"])
def test_null_or_blank_system_makes_no_turn(tmp_path, name, system):
    path = write(tmp_path / "a.json", [{**RECORDS[name], "system": system}])
    assert turns_of(path) == [TURNS[1:]]


def test_system_beside_a_list_of_turns_comes_first(tmp_path):
    path = write(tmp_path / "a.json", [{"messages": DICTS[1:], "system": " Be kind.\n"}])
    assert turns_of(path) == [TURNS]
    message = error_of(write(path, [{"messages": DICTS, "system": "Another."}]))
    assert "record 1: messages[0].role is a second system turn" in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_formats_may_be_mixed_in_a_file(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [*RECORDS.values(), GOOD])
    if suffix == ".parquet":  # from_pylist takes its columns from the first record only
        columns = {key: None for record in RECORDS.values() for key in record}
        write(path, [{**columns, **record} for record in [*RECORDS.values(), GOOD]])
    assert turns_of(path) == [TURNS] * len(RECORDS) + [[("user", "Hi"), ("assistant", "Hello.")]]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": 5, "response": "b"}, "prompt is a number; expected text"),
        ({"prompt": "a", "response": None}, "response is null; expected text"),
        ({"prompt": "a", "response": ["b"]}, "response[0] is text; expected an object with role and content"),
        ({"prompt": "a", "response": "\n "}, "response is an empty response"),
        ({"prompt": "", "response": "b"}, "prompt is an empty prompt"),
        ({"prompt": "a", "response": "b", "system": 3}, "system is a number; expected text"),
        ({"prompt": "a", "response": "\ud83d"}, r"response contains \ud83d, half of a character"),
        ({"instruction": None, "output": "b"}, "instruction is null; expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is a number; expected text"),
        ({"instruction": " ", "input": "", "output": "b"}, "instruction is an empty prompt"),
        ({"instruction": "a", "output": ""}, "output is an empty response"),
        ({"instruction": "a", "output": False}, "output is true or false; expected text"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0] is not a pair of texts"),
        ({"instruction": "a", "output": "b", "history": {"c": "d"}}, "history is an object; expected a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", 3]]}, "history[0][1] is a number; expected text"),
        ({"messages": DICTS, "history": [["c", "d"]]}, "history is given beside a complete list of turns"),
        (
            {"messages": DICTS, "functions": [{"name": "f"}], "tools": [{"name": "g"}]},
            "tools and functions contradict each other; keep one of them",
        ),
        (
            {"messages": [{**DICTS[0], "tools": [{"name": "f"}]}, *DICTS[1:]], "tools": [{"name": "g"}]},
            "tools and messages[0].tools contradict each other; keep one of them",
        ),
        ({"prompt": "a", "response": "b", "system": "c", "system_prompt": "d"}, "system and system_prompt contradict"),
        ({"prompt": "a", "response": "b", "reasoning": "c", "thinking": "d"}, "reasoning and thinking contradict"),
        ({"messages": DICTS, "reasoning": "c"}, "reasoning is given beside a list of turns; put it in the turn"),
        (
            {"prompt": "a", "response": "<think>c</think>b", "reasoning": "d"},
            "response begins with a <think> although there is reasoning_content; keep one",
        ),
        ({"prompt": "<image>a", "response": "b", "images": ["a.png"]}, "images is not supported, since only text"),
        ({"messages": [{**DICTS[1], "audio": "a.wav"}, DICTS[2]]}, "messages[0].audio is not supported, since only"),
        ({"messages": []}, "messages is an empty list; expected a list of turns with role and content"),
        ({"messages": "Hello"}, "messages is text; expected a list of turns"),
        ({"messages": {"role": "user"}}, "messages is an object; expected a list of turns"),
        ({"messages": None}, "messages is null; expected a list of turns"),
        ({"conversations": ["Hello"]}, "conversations[0] is text; expected an object with role and content"),
        (
            {"conversations": [DICTS[1], {"from": "gpt", "text": "b"}]},
            "conversations[1].value is missing; expected from and value, found from, text",
        ),
        ({"conversations": [{}]}, "conversations[0].role is missing; expected role and content, found none"),
        ({"conversations": [{"role": "user", "content": 1}]}, "conversations[0].content is a number"),
        ({"conversations": [DICTS[1], {"role": "robot", "content": "b"}]}, "conversations[1].role is 'robot'"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 1}]}, "[1].value is a number"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "conversations[0].role is 'narrator'"),
        ({"conversations": [DICTS[0], DICTS[0]]}, "conversations[1].role is a second system turn"),
        ({"conversations": DICTS[:2]}, "conversations has no assistant turn"),
        ({"messages": [{**DICTS[2], "tool_calls": [{}]}]}, "messages[0].tool_calls[0] is not a tool call"),
        ({"messages": [{**DICTS[2], "tool_calls": "f()"}]}, "messages[0].tool_calls[0] is not a tool call"),
        (
            {"messages": [{**DICTS[2], "tool_calls": [{"function": {"name": "f", "arguments": "a=1"}}]}]},
            "messages[0].tool_calls[0].arguments is not a JSON object",
        ),
        (
            {"messages": [{**DICTS[2], "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "messages[0].tool_calls[0].arguments is a list; expected an object",
        ),
        (
            {"messages": [{**DICTS[1], "tool_calls": [{"name": "f"}]}, DICTS[2]]},
            "messages[0].role is user, but there is tool_calls",
        ),
        ({"messages": [{**DICTS[1], "reasoning_content": "hm"}, DICTS[2]]}, "role is user, but there is reasoning"),
        (
            {"messages": [{"role": "assistant", "content": "<think>a</think>b", "reasoning": "a"}]},
            "messages[0].content begins with a <think> although there is messages[0].reasoning_content; keep one",
        ),
        ({"messages": [{**DICTS[2], "reasoning": 3}]}, "messages[0].reasoning_content is a number"),
        ({"messages": [{**DICTS[2], "weight": 0.5}]}, "messages[0].weight is 0.5; expected true or 1"),
        ({"messages": [{**DICTS[2], "weight": "1"}]}, "messages[0].weight is text; expected true or 1"),
        ({"messages": [{**DICTS[2], "train": "no"}]}, "messages[0].train is text; expected true or 1"),
        ({"messages": [{**DICTS[2], "train": True, "weight": 0}]}, "contradict each other"),
        ({"messages": [{**DICTS[2], "loss": 0, "mask": 1}]}, "messages[0].mask and messages[0].loss contradict"),
        ({"messages": [{**DICTS[2], "trainable": 2}]}, "messages[0].trainable is 2; expected true or 1"),
        ({"messages": [{**DICTS[2], "loss_mask": [0, 1]}]}, "messages[0].loss_mask is a list; expected true or 1"),
        ({"messages": [{**DICTS[1], "train": True}, DICTS[2]]}, "messages[0] asks to train on a turn of 'user'"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}, DICTS[2]]},
            "content[0] is an object without type; expected",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, DICTS[2]]},
            "messages[0].content[0].type is 'image_url'; expected reasoning, text, tool_call or tool_result",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "reasoning"}]}]},
            "messages[0].content[1] is a reasoning part after a part of a later type",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": 3}]}]}, "content[0].text is a num"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]}, "content[0].type is ['text']"),
        ({"messages": [{"role": ["user"], "content": "a"}, DICTS[2]]}, "messages[0].role is a list; expected system"),
        ({"messages": DICTS, "tools": "search"}, "tools is text; expected a list of function schemas"),
        ({"messages": DICTS, "tools": ["search"]}, "tools[0] is text; expected a function schema"),
        (
            {"messages": [{"role": "tool", "content": [{"type": "tool_result", "result": "4"}]}, DICTS[2]]},
            "messages[0].content[0] has no result; expected text or value, found type, result",
        ),
        (
            {"messages": [{"role": "assistant", "reasoning": "a", "content": [{"type": "reasoning", "text": "b"}]}]},
            "messages[0].content has reasoning, and so has the turn beside it; keep one of them",
        ),
        ({"chosen": "b", "rejected": "c"}, "chosen has no prompt; expected"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen is an empty response"),
        ("Hello", "the record is text; expected an object"),
        ({}, "the fields (none) fit no format"),
        (
            {"promt": "a", "response": "b"},
            "(promt, response) fit no format (is 'promt' meant to be 'prompt'?)",
        ),
        ({"id": 1, "instruction": "a", "Outputs": "b"}, "(is 'Outputs' meant to be 'output'?)"),
        ({"conversation_id": 1, "prompt": "a", "respons": "b"}, "(is 'respons' meant to be 'response'?)"),
        ({"prompt": "a", "responce": "b"}, "(is 'responce' meant to be 'response'?)"),
        ({"conversation": []}, "(is 'conversation' meant to be 'conversations'?)"),
        ({"text": "a"}, "the record is one text (text) without roles"),
        ({"x" * 5000: "a"}, "(" + "x" * 40 + ") fit no format;"),
    ],
)
@pytest.mark.parametrize(("suffix", "place"), [(".json", "record 3"), (".jsonl", "line 3")])
def test_bad_record_error_names_file_position_and_field(tmp_path, record, expected, suffix, place):
    path = tmp_path / f"data{suffix}"
    records = [json.dumps(each) for each in (GOOD, GOOD, record)]
    raw(path, "[" + ",".join(records) + "]" if suffix == ".json" else "\n".join(records))
    message = error_of(path)
    assert message.startswith(f"{path}, {place}: ")
    assert expected in message


def test_error_lists_formats_and_their_fields(tmp_path):
    message = error_of(write(tmp_path / "a.json", [{"body": "a"}]))
    for name, format in FORMATS.items():
        assert f"{name} ({', '.join(format.fields)})" in message


def test_bad_record_in_csv_and_parquet(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "a\nb", "response": "c"}, {"prompt": "d", "response": ""}])
    assert error_of(path).startswith(f"{path}, line 4: response is an empty response")
    path = write(tmp_path / "a.parquet", [{"prompt": "a", "response": 1}])
    assert error_of(path).startswith(f"{path}, record 1: response is a number; expected text")


def test_named_format_is_required_of_every_record(tmp_path):
    path = write(tmp_path / "a.json", [RECORDS["alpaca"], GOOD])
    assert error_of(path, "alpaca").startswith(f"{path}, record 2: the fields (prompt, response) fit no format; ")
    assert error_of(path, "alpaca").endswith(
        "expected alpaca (instruction, output); "
        "data.columns (scripts/prepare_sft_data.py: --columns) maps other column names."
    )
    both = write(tmp_path / "b.json", [{**GOOD, "messages": DICTS}])
    assert turns_of(both, "messages") == turns_of(both) == [TURNS]
    assert turns_of(both, "prompt_response") == [[("user", "Hi"), ("assistant", "Hello.")]]


def test_unknown_format_error_lists_formats(tmp_path):
    with pytest.raises(DataError) as caught:
        read_conversations(write(tmp_path / "a.json", [GOOD]), "alpacca")
    assert all(name in str(caught.value) for name in ["'alpacca'", "auto", *FORMATS])
