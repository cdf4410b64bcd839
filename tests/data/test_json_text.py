"""JSON that would be read in part, or that nothing could process further, is one message or a skipped record."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_recipe.data import readers
from sft_recipe.data.columns import Columns
from sft_recipe.data.formats import to_conversation
from sft_recipe.data.json_text import MAX_DEPTH, JsonProblem, decode, loads
from sft_recipe.data.pipeline import read_data
from sft_recipe.data.readers import BadRecord
from sft_recipe.errors import DataError
from tests.data.files import GOOD, error_of, raw
from tests.data.stores import build

GOOD_TEXT = json.dumps(GOOD)


def nested(levels):
    return "[" * levels + "]" * levels


def with_number(text):
    return f'{{"prompt": "a", "response": "b", "n": {text}}}'


PROBLEMS = {
    '{"prompt": "a", "response": "b", "prompt": "c"}': "the key 'prompt' occurs twice in an object; keep one of them",
    '{"messages": [{"role": "user", "content": "a", "role": "tool"}]}': "the key 'role' occurs twice in an object",
    with_number("9" * 5000): "a number has more than 4,300 digits",
    with_number(nested(MAX_DEPTH)): "nested more than 100 levels deep",
    with_number(nested(900)): "nested more than 100 levels deep",
}
each_problem = pytest.mark.parametrize(("record", "problem"), PROBLEMS.items(), ids=range(len(PROBLEMS)))


@each_problem
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("block", [1 << 20, 7])
def test_record_with_a_problem_is_named_and_reading_goes_on(tmp_path, monkeypatch, record, problem, suffix, block):
    monkeypatch.setattr(readers, "BLOCK", block)
    texts = [GOOD_TEXT, record, GOOD_TEXT]
    path = raw(tmp_path / f"a{suffix}", "\n".join(texts) if suffix == ".jsonl" else f"[{', '.join(texts)}]")
    one, bad, other = read_data(path)
    assert one == other and isinstance(bad, BadRecord) and bad.record == record and bad.error.kind == "malformed"
    assert problem in str(bad.error)
    assert str(bad.error).startswith(f"{path}, {'line' if suffix == '.jsonl' else 'record'} 2: ")
    assert error_of(path) == str(bad.error)


@each_problem
def test_record_with_a_problem_is_skipped_by_worker_processes_too(
    tmp_path, tokenizer, cache_dir, pools, record, problem
):
    path = raw(tmp_path / "a.json", f"[{', '.join([GOOD_TEXT] * 12 + [record])}]")
    store = build(path, tokenizer, cache_dir, workers=2, on_bad_record="skip")
    assert (store.report.examples, store.report.rejected, pools) == (12, {"malformed": 1}, [2])
    (line,) = (store.folder / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == record


def test_first_line_with_a_problem_still_is_a_line(tmp_path):
    path = raw(tmp_path / "a.json", f'{{"prompt": "a", "prompt": "b"}}\n{GOOD_TEXT}\n')
    assert [isinstance(item, BadRecord) for item in read_data(path)] == [True, False]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": '[{"role": "user", "role": "tool"}]'}, "messages: the key 'role' occurs twice in an object"),
        ({**GOOD, "tools": f'[{{"name": "f", "x": {nested(900)}}}]'}, "tools: arrays or objects are nested more than"),
        ({**GOOD, "tools": nested(200_000)}, "tools is text; expected a list"),
        ({**GOOD, "history": f"[{'9' * 5000}]"}, "history: a number has more than 4,300 digits"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}]},
            "messages[0].tool_calls[0].arguments: the key 'a' occurs twice",
        ),
    ],
)
def test_json_inside_texts(record, expected):
    with pytest.raises(DataError) as caught:
        to_conversation(Columns({"role": "who"}).rename(record, "a.csv, line 2"), "a.csv, line 2")
    assert str(caught.value).startswith(f"a.csv, line 2: {expected}")


def test_levels_are_counted_exactly():
    assert loads(nested(MAX_DEPTH)) is not None
    assert decode(nested(MAX_DEPTH) + "," + nested(MAX_DEPTH), 0)[1] == 2 * MAX_DEPTH
    assert len(loads("[" + "[]," * 500 + "[]]")) == 501
    with pytest.raises(JsonProblem):
        loads(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize("text", ["[1] x", "[1]]", "{}{}", "[1,]", ""])
def test_malformed_text(text):
    with pytest.raises(json.JSONDecodeError):
        loads(text)


def test_two_columns_of_one_name(tmp_path):
    path = raw(tmp_path / "a.csv", "prompt,response,prompt\na,b,c\n")
    assert error_of(path) == f"{path}, line 1: two columns are named 'prompt'; rename or remove one of them."
    assert len(list(read_data(raw(path, "prompt,response,,\na,b,,\n")))) == 1
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["prompt", "response", "prompt"]), path)
    assert error_of(path) == f"{path}: two columns are named 'prompt'; rename or remove one of them."
