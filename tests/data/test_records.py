"""What each format that people have says, message by message; and nothing in tools and calls is touched."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_recipe.data import readers as containers
from sft_recipe.data.formats import Columns, read_conversations, read_data, to_conversation
from sft_recipe.data.messages import Message
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.sources import resolve_files
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
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "value": "2 + 2?"}]},
    {"role": "assistant", "content": [{"type": "tool_call", "value": CALL["function"]}]},
    {"role": "tool", "content": [{"type": "tool_result", "value": {"sum": 4}, "name": "add"}]},
    {"role": "assistant", "content": [{"type": "reasoning", "text": "Easy."}, {"type": "text", "text": "4"}]},
]
THOUGHT = Message("assistant", "4", reasoning="Easy.")
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
        (
            {"messages": [OPENAI[0], {"role": "assistant", "content": "", "function_call": CALL["function"]}]},
            (Q, CALLING),
        ),
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
def test_what_a_record_says(record, messages):
    assert to_conversation(record, "").messages == messages


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS), "", None, "{}"])
def test_arguments_are_an_object_with_its_keys_in_order(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    record = {"messages": [OPENAI[0], {"role": "assistant", "tool_calls": [call]}]}
    (found,) = to_conversation(record, "").messages[1].tool_calls
    expected = ARGUMENTS if arguments in (ARGUMENTS, json.dumps(ARGUMENTS)) else {}
    assert json.dumps(found["function"]["arguments"]) == json.dumps(expected)


@pytest.mark.parametrize("tools", [[SCHEMA], [BARE_SCHEMA], json.dumps([SCHEMA]), json.dumps([BARE_SCHEMA])])
def test_schemas_are_untouched(tools):
    """Keys in their order, null where it is written; a bare schema is given the wrapping that templates want."""
    found = to_conversation({"conversations": SHAREGPT, "tools": tools}, "").tools
    assert json.dumps(found) == json.dumps([SCHEMA])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_key_that_one_record_lacks_is_no_null_in_another(tmp_path, suffix):
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


def test_a_conversation_as_a_record_is_the_same_conversation():
    record = {
        "messages": [*OPENAI, OPENAI[0], {"role": "assistant", "content": "4", "train": False}],
        "tools": [SCHEMA],
    }
    conversation = to_conversation(record, "")
    assert to_conversation(json.loads(json.dumps(conversation.as_record())), "") == conversation


def test_templates_get_no_key_that_a_turn_lacks():
    dicts = to_conversation({"messages": OPENAI}, "").as_dicts()
    assert [sorted(turn) for turn in dicts] == [
        ["content", "role"],
        ["content", "role", "tool_calls"],
        ["content", "role", "tool_call_id"],
        ["content", "reasoning_content", "role"],
    ]


# Other names of columns


def rows(tmp_path, *records):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_columns_with_other_names(tmp_path):
    path = rows(tmp_path, {"question": Q.content, "answer": "4", "prompt": "ignored"}, {"prompt": "a", "response": "b"})
    columns = Columns({"prompt": "question", "response": "answer"})
    found = [conversation.messages for conversation in read_data(path, columns=columns)]
    assert found == [(Q, A), (Message("user", "a"), Message("assistant", "b"))]
    columns.check_all_found()


def test_turns_with_other_names(tmp_path):
    path = rows(tmp_path, {"dialog": [{"who": "user", "says": Q.content}, {"who": "assistant", "says": "4"}]})
    columns = Columns({"messages": "dialog", "role": "who", "content": "says"})
    assert [conversation.messages for conversation in read_data(path, columns=columns)] == [(Q, A)]
    columns.check_all_found()


def test_a_column_that_no_record_has_is_told(tmp_path):
    columns = Columns({"system": "sytsem"})
    assert len(list(read_data(rows(tmp_path, {"prompt": "a", "response": "b"}), columns=columns))) == 1
    with pytest.raises(DataError, match="system is to be 'sytsem', which no record has"):
        columns.check_all_found()


def test_a_name_that_no_format_has_is_told():
    with pytest.raises(ConfigError, match="names 'respons', which no format has. Did you mean response?"):
        Columns({"respons": "answer"})


# Files


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_compressed_files(tmp_path, suffix, codec):
    texts = {
        ".json": json.dumps([{"prompt": f"问 {n}", "response": "4"} for n in range(50)], indent=1),
        ".jsonl": "".join(json.dumps({"prompt": f"问 {n}", "response": "4"}) + "\n" for n in range(50)),
        ".csv": "prompt,response\n" + "".join(f"问 {n},4\n" for n in range(50)),
    }
    whole = texts[suffix].encode()
    path = tmp_path / f"a{suffix}{codec}"
    squeeze = gzip.compress if codec == ".gz" else lambda data: pa.compress(data, "zstd", asbytes=True)
    half = len(whole) // 2
    path.write_bytes(squeeze(whole[:half]) + squeeze(whole[half:]))  # files of several parts are usual
    assert [c.messages[0].content for c in read_conversations(path)] == [f"问 {n}" for n in range(50)]
    path.write_bytes(squeeze(whole)[:-9])
    with pytest.raises(DataError, match=f"a{suffix}{codec}: cannot be read"):
        list(read_conversations(path))
    path.write_bytes(whole)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_conversations(path))


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block, indent):
    records = [{"prompt": "x" * n + '"\\\n好', "response": str(n), "n": [n, 2.5, None]} for n in range(40)]
    monkeypatch.setattr(containers, "BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert [record for _, record in containers.read_records(path)] == records


@pytest.mark.parametrize("block", [5, 1 << 20])
@pytest.mark.parametrize(("place", "byte"), [(3, "}"), (40, "]"), (41, '"'), (77, ","), (199, ":")])
def test_a_damaged_array_is_told_where_json_itself_tells_it(tmp_path, monkeypatch, block, place, byte):
    text = json.dumps([{"prompt": f"Is {n}?", "response": "Yes."} for n in range(9)], indent=1)
    damaged = text[:place] + byte + text[place + 1 :]
    monkeypatch.setattr(containers, "BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(damaged)
    with pytest.raises(json.JSONDecodeError) as oracle:
        json.loads(damaged)
    expected = f"line {oracle.value.lineno}, column {oracle.value.colno}: malformed JSON ({oracle.value.msg})"
    with pytest.raises(DataError) as caught:
        list(containers.read_records(path))
    assert expected in str(caught.value)


def test_commas_blank_lines_and_carriage_returns_do_no_harm(tmp_path):
    line = json.dumps({"prompt": "a", "response": "b"})
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"\ufeff{line},\r\n\r\n{line} , \r\n{line},".encode())
    assert len(list(read_conversations(path))) == 3
    path = tmp_path / "a.json"
    path.write_bytes(f"\ufeff[{line},\r\n{line},\r\n]\r\n".encode())
    assert len(list(read_conversations(path))) == 2


def test_reading_goes_on_after_a_bad_line(tmp_path):
    good = json.dumps({"prompt": "a", "response": "b"}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b"{broken", good, b'{"prompt": "\xff"}', b'{"prompt": ""}', b"3", good]))
    items = list(read_data(path))
    assert [isinstance(item, BadRecord) for item in items] == [False, True, False, True, True, True, False]
    kinds = [item.error.kind for item in items if isinstance(item, BadRecord)]
    assert kinds == ["malformed", "malformed", "fields", "type"]
    assert "line 4: not UTF-8" in str(items[3].error)
    assert items[1].record == "{broken"


# Shares of files, data sets of the hub


@pytest.mark.parametrize(
    ("spec", "wanted"), [("a.json", 10), ("a.json*0.5", 5), ("a.json*2", 20), ("a.json*.01", 1), ("a.json#7", 7)]
)
def test_a_file_with_a_share(tmp_path, monkeypatch, spec, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[1]")
    (source,) = resolve_files(spec)
    assert [file.name for file in source.files] == ["a.json"] and source.name == "a.json"
    assert source.target_count(10) == wanted


def test_a_glob_has_one_share_and_a_file_may_be_called_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json", "b.json*2"):
        (tmp_path / name).write_text("[1]")
    glob = resolve_files("?.json*0.5")[0]
    assert [file.name for file in glob.files] == ["a.json", "b.json"] and glob.weight == 0.5
    with pytest.raises(DataError, match="unknown kind of file"):
        resolve_files("b.json*2")
    for nothing in ("a.json*0", "a.json#0"):
        with pytest.raises(DataError, match="asks for nothing of a.json"):
            resolve_files(nothing)


def test_a_data_set_of_the_hub_becomes_a_file(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (source,) = resolve_files("owner/name:train[:10]#1", tmp_path / "cache")
    assert asked == [("owner/name", "train[:10]")] and source.count == 1
    assert [c.messages[0].content for c in read_conversations(source.files[0])] == ["a", "c"]
    assert resolve_files("owner/name", tmp_path / "cache")[0].files == source.files
    assert asked[1] == ("owner/name", "train")


def test_a_data_set_that_cannot_be_had_is_told(tmp_path, monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach the hub\nin five attempts")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"owner/name \(split train\) is neither a file .* \(Couldn't reach the hub\)"):
        resolve_files("owner/name", tmp_path / "cache")
