"""Every format in every container comes back byte for byte; every bad input is named by place and field."""

import csv
import json
import os
import tempfile
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipe.config.schema import DataConfig
from sft_recipe.data.formats import FORMATS, read_conversations
from sft_recipe.data.sources import resolve_files
from sft_recipe.errors import DataError

TRICKY = ' "quoted", it\'s\r\n你好，世界 👩‍🚀 \u2028 \\n \ufeff\ttrailing  '
TURNS = [("system", " Be kind.\n"), ("user", TRICKY), ("assistant", TRICKY + "!")]
DICTS = [{"role": role, "content": content} for role, content in TURNS]
RECORDS = {
    "preference": {"prompt": TRICKY, "chosen": TRICKY + "!", "rejected": "No.", "system": " Be kind.\n"},
    "prompt_completion": {"prompt": TRICKY, "completion": TRICKY + "!", "system": " Be kind.\n"},
    "query_response": {"query": TRICKY, "response": TRICKY + "!", "system": " Be kind.\n"},
    "prompt_response": {"prompt": TRICKY, "response": TRICKY + "!", "system": " Be kind.\n", "id": "7"},
    "alpaca": {"instruction": TRICKY, "input": "", "output": TRICKY + "!", "system": " Be kind.\n"},
    "conversations": {"conversations": DICTS, "id": "7"},
    "messages": {"messages": DICTS},
}
SUFFIXES = [".json", ".jsonl", ".parquet", ".csv"]
GOOD = {"prompt": "Hi", "response": "Hello."}


def write(path, records):
    """Write records as the container that the suffix names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(records[0])
            for record in records:
                rows.writerow([v if isinstance(v, str) else json.dumps(v) for v in record.values()])
    return path


def raw(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def turns_of(path, format="auto"):
    return [[(m.role, m.content) for m in c.messages] for c in read_conversations(path, format)]


def error_of(path, format="auto"):
    with pytest.raises(DataError) as caught:
        list(read_conversations(path, format))
    return str(caught.value)


def paths_of(spec):
    return [file for source in resolve_files(spec) for file in source.files]


def files_error(spec):
    with pytest.raises(DataError) as caught:
        resolve_files(spec)
    return str(caught.value)


# What is read


@pytest.mark.parametrize("format", ["auto", "own"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", RECORDS)
def test_every_format_in_every_container_keeps_every_byte(tmp_path, name, suffix, format):
    path = write(tmp_path / f"data{suffix}", [RECORDS[name]] * 3)
    assert turns_of(path, name if format == "own" else "auto") == [TURNS] * 3


def test_the_named_formats_are_those_of_the_configuration():
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
def test_source_names_file_and_place(tmp_path, suffix, places):
    path = write(tmp_path / f"data{suffix}", [{"prompt": "a\nb\nc", "response": "d"}, GOOD])
    assert [c.source for c in read_conversations(path)] == [f"{path}, {place}" for place in places]


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
roles = st.sampled_from(["user", "assistant"])
dialogues = st.lists(st.tuples(roles, text), min_size=1, max_size=5).map(lambda t: [*t, ("assistant", "end")])


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40, deadline=None)
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
    assert "record 1: messages[0].role makes a second system turn" in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_formats_may_be_mixed_in_a_file(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [*RECORDS.values(), GOOD])
    if suffix == ".parquet":  # from_pylist takes its columns from the first record only
        columns = {key: None for record in RECORDS.values() for key in record}
        write(path, [{**columns, **record} for record in [*RECORDS.values(), GOOD]])
    assert turns_of(path) == [TURNS] * len(RECORDS) + [[("user", "Hi"), ("assistant", "Hello.")]]


def test_jsonl_skips_blank_lines_and_a_byte_order_mark_and_crlf(tmp_path):
    line = json.dumps(GOOD)
    path = raw(tmp_path / "a.jsonl", f"\ufeff{line}\r\n\r\n   \n{line}")
    assert [c.source for c in read_conversations(path)] == [f"{path}, line 1", f"{path}, line 4"]


@pytest.mark.parametrize("data", ['\ufeff[{"prompt": "a", "response": "b"}]', "\ufeffprompt,response\r\na,b\r\n\r\n"])
def test_byte_order_mark_elsewhere(tmp_path, data):
    path = raw(tmp_path / ("a.csv" if "," in data[:9] else "a.json"), data)
    assert turns_of(path) == [[("user", "a"), ("assistant", "b")]]


def test_json_file_of_lines_is_read_as_lines(tmp_path):
    line = json.dumps(GOOD)
    path = raw(tmp_path / "a.json", f"\n{line}\n\n{line}\n")
    assert [c.source for c in read_conversations(path)] == [f"{path}, line 2", f"{path}, line 4"]


def test_byte_order_mark_inside_a_text_is_kept(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "a\n\ufeffb", "response": "c"}])
    assert turns_of(path) == [[("user", "a\n\ufeffb"), ("assistant", "c")]]


def test_upper_case_suffix(tmp_path):
    assert len(turns_of(raw(tmp_path / "A.JSONL", json.dumps(GOOD)))) == 1


def test_csv_cell_longer_than_the_default_limit(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "x" * 200_000, "response": "y"}])
    assert len(turns_of(path)[0][0][1]) == 200_000


def test_parquet_is_read_over_batches_and_drops_keys_a_row_lacks(tmp_path):
    turns = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": "b", "x": "y"},
    ]
    path = write(tmp_path / "a.parquet", [{"messages": turns}] * 3000)
    sources = [c.source for c in read_conversations(path)]
    assert len(sources) == 3000 and sources[-1] == f"{path}, record 3000"
    lacking = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}]
    assert "messages[1].content is missing; expected role and content, found role" in error_of(write(path, lacking))


def test_reading_is_lazy_but_the_file_is_checked_at_once(tmp_path):
    first = next(read_conversations(raw(tmp_path / "a.jsonl", json.dumps(GOOD) + "\n{broken")))
    assert first.messages[0].content == "Hi"
    with pytest.raises(DataError, match="not found"):
        read_conversations(tmp_path / "no.json")


# Bad records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": 5, "response": "b"}, "prompt is a number; expected text"),
        ({"prompt": "a", "response": None}, "response is null; expected text"),
        ({"prompt": "a", "response": ["b"]}, "response[0] is text; expected an object with role and content"),
        ({"prompt": "a", "response": "\n "}, "response is an empty response"),
        ({"prompt": "", "response": "b"}, "prompt is an empty prompt"),
        ({"prompt": "a", "response": "b", "system": 3}, "system is a number; expected text"),
        ({"prompt": "a", "response": "\ud83d"}, r"response holds \ud83d, half of a character"),
        ({"instruction": None, "output": "b"}, "instruction is null; expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is a number; expected text"),
        ({"instruction": " ", "input": "", "output": "b"}, "instruction is an empty prompt"),
        ({"instruction": "a", "output": ""}, "output is an empty response"),
        ({"instruction": "a", "output": False}, "output is true or false; expected text"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0] is no pair of texts"),
        ({"instruction": "a", "output": "b", "history": {"c": "d"}}, "history is an object; expected a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", 3]]}, "history[0][1] is a number; expected text"),
        ({"messages": DICTS, "history": [["c", "d"]]}, "history stands beside a list of turns"),
        ({"messages": DICTS, "functions": [{"name": "f"}]}, "functions is not read; write the schemas as tools"),
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
        ({"conversations": [DICTS[1], {"role": "bot", "content": "b"}]}, "conversations[1].role is 'bot'"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 1}]}, "[1].value is a number"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "conversations[0].role is 'narrator'"),
        ({"conversations": [DICTS[0], DICTS[0]]}, "conversations[1].role makes a second system turn"),
        ({"conversations": DICTS[:2]}, "conversations has no assistant turn"),
        ({"messages": [{**DICTS[2], "tool_calls": [{}]}]}, "messages[0].tool_calls[0] is no call of a tool"),
        ({"messages": [{**DICTS[2], "tool_calls": "f()"}]}, "messages[0].tool_calls[0] is no call of a tool"),
        (
            {"messages": [{**DICTS[2], "tool_calls": [{"function": {"name": "f", "arguments": "a=1"}}]}]},
            "messages[0].tool_calls[0].arguments is no JSON object",
        ),
        (
            {"messages": [{**DICTS[2], "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "messages[0].tool_calls[0].arguments is a list; expected an object",
        ),
        (
            {"messages": [{**DICTS[1], "tool_calls": [{"name": "f"}]}, DICTS[2]]},
            "messages[0].role is user, which has no tool_calls",
        ),
        ({"messages": [{**DICTS[1], "reasoning_content": "hm"}, DICTS[2]]}, "role is user, which has no reasoning"),
        (
            {"messages": [{"role": "assistant", "content": "<think>a</think>b", "reasoning": "a"}]},
            "messages[0].content begins with a <think> beside messages[0].reasoning_content",
        ),
        ({"messages": [{**DICTS[2], "reasoning": 3}]}, "messages[0].reasoning_content is a number"),
        ({"messages": [{**DICTS[2], "weight": 0.5}]}, "messages[0].weight is 0.5; expected 1"),
        ({"messages": [{**DICTS[2], "weight": "1"}]}, "messages[0].weight is text; expected 1"),
        ({"messages": [{**DICTS[2], "train": "no"}]}, "messages[0].train is text; expected true or false"),
        ({"messages": [{**DICTS[2], "train": True, "weight": 0}]}, "contradict each other"),
        ({"messages": [{**DICTS[1], "train": True}, DICTS[2]]}, "messages[0] asks to learn a turn of 'user'"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}, DICTS[2]]}, "messages[0].content[0] is an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, DICTS[2]]},
            "messages[0].content[0].type is 'image_url'; expected reasoning, text, tool_call or tool_result",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "reasoning"}]}]},
            "messages[0].content[1] is a reasoning part after a later kind",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": 3}]}]}, "content[0].text is a num"),
        ({"messages": DICTS, "tools": "search"}, "tools is text; expected a list of function schemas"),
        ({"messages": DICTS, "tools": ["search"]}, "tools is a list; expected a list of function schemas"),
        ({"chosen": "b", "rejected": "c"}, "chosen has no prompt beside it"),
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
        ({"text": "a"}, "the record is one text (text), in which nothing says what was asked"),
        ({"x" * 5000: "a"}, "(" + "x" * 40 + ") fit no format;"),
    ],
)
@pytest.mark.parametrize(("suffix", "place"), [(".json", "record 3"), (".jsonl", "line 3")])
def test_bad_record_is_named_by_file_place_and_field(tmp_path, record, expected, suffix, place):
    path = tmp_path / f"data{suffix}"
    records = [json.dumps(each) for each in (GOOD, GOOD, record)]
    raw(path, "[" + ",".join(records) + "]" if suffix == ".json" else "\n".join(records))
    message = error_of(path)
    assert message.startswith(f"{path}, {place}: ")
    assert expected in message


def test_the_formats_and_their_fields_are_listed(tmp_path):
    message = error_of(write(tmp_path / "a.json", [{"body": "a"}]))
    for name, format in FORMATS.items():
        assert f"{name} ({', '.join(format.fields)})" in message


def test_bad_record_in_csv_and_parquet(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "a\nb", "response": "c"}, {"prompt": "d", "response": ""}])
    assert error_of(path).startswith(f"{path}, line 4: response is an empty response")
    path = write(tmp_path / "a.parquet", [{"prompt": "a", "response": 1}])
    assert error_of(path).startswith(f"{path}, record 1: response is a number; expected text")


def test_a_named_format_is_required_of_every_record(tmp_path):
    path = write(tmp_path / "a.json", [RECORDS["alpaca"], GOOD])
    assert error_of(path, "alpaca").startswith(f"{path}, record 2: the fields (prompt, response) fit no format; ")
    assert error_of(path, "alpaca").endswith(
        "expected alpaca (instruction, output); data.columns gives other names to columns."
    )
    both = write(tmp_path / "b.json", [{**GOOD, "messages": DICTS}])
    assert turns_of(both, "messages") == turns_of(both) == [TURNS]
    assert turns_of(both, "prompt_response") == [[("user", "Hi"), ("assistant", "Hello.")]]


def test_unknown_format_lists_the_known(tmp_path):
    with pytest.raises(DataError) as caught:
        read_conversations(write(tmp_path / "a.json", [GOOD]), "alpacca")
    assert all(name in str(caught.value) for name in ["'alpacca'", "auto", *FORMATS])


# Bad files


@pytest.mark.parametrize(
    ("name", "data", "place", "near"),
    [
        ("a.json", '[\n {"prompt": "a"\n  "response": "b"}\n]', "line 3, column 3", '"response": "b"}'),
        ("a.json", '[\n {"prompt": "a",\n', "line 3, column 1", "the end"),
        ("a.json", '{"prompt": "a" "response": "b"}\n{}', "line 1, column 16", '"response"'),
        ("a.jsonl", '{"a": 1}\n\n{"prompt": oops}\n', "line 3, column 12", "oops}"),
        ("a.jsonl", '\n{"prompt": "a",\n', "line 2, column 16", '{"prompt": "a",'),
        ("a.json", '[{"prompt": "' + "x" * 999 + '" oops "' + "y" * 999 + '"}]', "column 1015", 'x" oops "y'),
    ],
)
def test_malformed_json(tmp_path, name, data, place, near):
    path = raw(tmp_path / name, data.replace('{"a": 1}', json.dumps(GOOD)))
    message = error_of(path)
    assert str(path) in message and place in message and "malformed JSON" in message and near in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("data", "place", "problem"),
    [
        ('prompt,response\na,b\n"c,d\ne,f\n', "line 3", "malformed CSV"),
        ("prompt,response\na,b,c\n", "line 2", "3 cells where the header has 2"),
        ("prompt,response\n\na\n", "line 3", "1 cells where the header has 2"),
        ("question,answer\na,b\n", "line 2", "the fields (question, answer) fit no format"),
    ],
)
def test_malformed_csv(tmp_path, data, place, problem):
    path = raw(tmp_path / "a.csv", data)
    assert error_of(path).startswith(f"{path}, {place}: {problem}")


def test_damaged_parquet(tmp_path):
    whole = write(tmp_path / "a.parquet", [GOOD] * 100).read_bytes()
    broken_text = whole.replace(b"Hello.", b"Hel\xff\xff.")
    for data in (broken_text, whole[:-50], b"PAR1" * 9, whole[:40] + b"\xff" * 40 + whole[80:]):
        path = raw(tmp_path / "b.parquet", data)
        assert error_of(path).startswith(f"{path}: cannot be read as Parquet")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_not_utf8_is_named_by_line(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [{"prompt": "a", "response": "b"}])
    path = raw(path, path.read_bytes().rstrip() + "\n\n你好".encode("gbk"))
    assert error_of(path).startswith(f"{path}, line {4 if suffix == '.csv' else 3}: not UTF-8")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", "[]"),
        ("a.json", " \n"),
        ("a.json", "\ufeff"),
        ("a.jsonl", "\n \n"),
        ("a.csv", "prompt,response\n"),
        ("a.csv", "\n"),
    ],
)
def test_no_records(tmp_path, name, data):
    path = raw(tmp_path / name, data)
    assert error_of(path).startswith(f"{path}: no records")


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert error_of(path).startswith(f"{path}: no records")


@pytest.mark.parametrize(
    ("data", "found"),
    [('{"prompt": "a", "response": "b"}', "an object"), ('{\n"a": 1\n}', "an object"), ("3", "a number")],
)
def test_json_that_is_no_array(tmp_path, data, found):
    path = raw(tmp_path / "a.json", data)
    assert error_of(path).startswith(f"{path}: the file holds {found}; expected an array")


@pytest.mark.parametrize("data", ['[{"prompt": "a"}]', " [\n{}\n]"])
def test_array_in_a_file_of_lines(tmp_path, data):
    path = raw(tmp_path / "a.jsonl", data)
    assert error_of(path).startswith(f"{path}, line 1: an array begins; expected one object per line")


# Which files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.json", "a.json", "c.jsonl", "x, y.json", "notes.txt", "w[1].json"):
        raw(Path(name), "[1]")
    Path("empty.csv").touch()
    Path("sub.json").mkdir()
    return tmp_path


def test_file_glob_and_list(folder):
    assert paths_of("b.json") == paths_of(Path("b.json")) == [Path("b.json")]
    assert paths_of("[ab].json") == [Path("a.json"), Path("b.json")]
    assert paths_of(["c.jsonl", Path("b.json"), "a.js*"]) == [
        Path("c.jsonl"),
        Path("b.json"),
        Path("a.json"),
    ]
    assert paths_of("x, y.json") == [Path("x, y.json")]
    assert paths_of("w[1].json") == [Path("w[1].json")]
    assert paths_of(str(folder / "?.json")) == [folder / "a.json", folder / "b.json"]


def test_glob_is_sorted_whatever_order_the_disk_has(folder, monkeypatch):
    monkeypatch.setattr("glob.glob", lambda *args, **kwargs: ["b.json", "c.jsonl", "a.json"])
    assert paths_of("*.json*") == [Path("a.json"), Path("b.json"), Path("c.jsonl")]


def test_home_and_recursive_globs(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert paths_of("~/a.json") == [folder / "a.json"]
    raw(folder / "sub.json" / "a.json", "[1]")
    assert paths_of("**/a.json") == [Path("a.json"), Path("sub.json/a.json")]


def test_missing_file_is_named_in_full_with_its_neighbours(folder):
    message = files_error(["a.json", "c.json"])
    assert f"not found: {folder / 'c.json'};" in message and "c.jsonl" in message
    assert f"there is no folder {folder / 'gone'}" in files_error("gone/a.json")


def test_glob_that_matches_nothing(folder):
    for pattern in ("q*.json", "sub*"):  # a folder is no match
        assert f"No file matches {folder / pattern}" in files_error(pattern)


def test_directory(folder):
    message = files_error(".")
    assert "a directory (with a.json, b.json, c.jsonl, empty.csv, sub.json)" in message
    assert "sub.json: a directory (with no data files)" in files_error("sub.json")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("empty.csv", "empty.csv: the file is empty"),
        ("notes.txt", "notes.txt: a text per line says neither what was asked nor what is to be learnt"),
        (["a.json", "./sub.json/../a.json"], "the file is given twice"),
        (["b.json", "?.json"], "b.json: the file is given twice"),
        ([], "No data file is given"),
    ],
)
def test_unusable_files(folder, spec, expected):
    assert expected in files_error(spec)


def test_link_to_the_same_file_is_the_same_file(folder):
    Path("link.json").symlink_to("a.json")
    assert "link.json: the file is given twice" in files_error(["a.json", "link.json"])


def test_unreadable_file(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a mode of 0 does not stop root
    assert "a.json: no permission to read" in files_error("a.json")


def test_read_conversations_checks_the_file_too(folder):
    for name, expected in {
        "empty.csv": "is empty",
        "sub.json": "a directory",
        "notes.txt": "a text per line",
    }.items():
        with pytest.raises(DataError, match=expected):
            read_conversations(name)
