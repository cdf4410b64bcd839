"""Every key that is not read is counted and named; every key that is read has an effect."""

import json

import pytest

from sft_recipe.config.schema import DataConfig
from sft_recipe.data.formats import to_conversation
from sft_recipe.data.notices import data_notices
from sft_recipe.data.preview.html import page
from sft_recipe.data.preview.stats import DatasetStats
from sft_recipe.data.preview.terminal import summary
from sft_recipe.data.remarks import MAX_KEYS, OTHER_KEYS, Remarks
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.token_store import TokenStore
from sft_recipe.errors import DataError
from tests.data.stores import build, write

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
PAIR = {"prompt": "Hi", "response": "Hello."}
CALL = {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        (PAIR, ()),
        ({**PAIR, "response": '{"event": "workshop", "day": "Monday"}'}, ()),
        ({**PAIR, "response": '[{"event": "workshop"}, {"event": "dinner"}]'}, ()),
        ({"messages": json.dumps([USER, {**ANSWER, "note": 1}])}, ("messages[].note",)),
        ({**PAIR, "id": 7, "note": None, "tags": [], "score": float("nan")}, ("id",)),
        ({**PAIR, "messages": [USER, ANSWER]}, ("prompt", "response")),
        ({**PAIR, "system": "a", "tools": [{"name": "f"}], "history": [["a", "b"]], "thinking": "c"}, ()),
        ({**PAIR, "reasoning": True, "input": "a"}, ("reasoning", "input")),
        ({"instruction": "a", "input": "b", "output": "c", "text": "d"}, ("text",)),
        ({"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"}, ("rejected",)),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": "d", "score": 1}, ("rejected", "score")),
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": ""}, ()),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "messages": [USER, ANSWER]}, ("prompt",)),
        ({"prompt": "Hi", "completion": [{**ANSWER, "note": 1}]}, ("completion[].note",)),
        (
            {"messages": [{**USER, "name": "Bo", "train": False}, {**ANSWER, "id": 1}]},
            ("messages[].id",),
        ),
        (
            {"messages": [{**USER, "tools": [1]}, {**ANSWER, "weight": 1, "from": "gpt"}]},
            ("messages[].tools", "messages[].from"),
        ),
        ({"messages": json.dumps([USER, {**ANSWER, "id": 1}])}, ("messages[].id",)),
        (
            {"conversations": [{"from": "human", "value": "Hi", "content": "Ho"}, {"from": "gpt", "value": "Yes"}]},
            ("conversations[].content",),
        ),
        (
            {"conversations": [{"from": "function_call", "value": json.dumps({**CALL, "n": 1})}]},
            ("conversations[].value[].n",),
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"index": 1, "function": {**CALL, "strict": True}}]}]},
            ("messages[].tool_calls[].index", "messages[].tool_calls[].function.strict"),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": "b", "name": "c"}]},
                    ANSWER,
                ]
            },
            ("messages[].content[].cache_control", "messages[].content[].name"),
        ),
        (
            {
                "messages": [
                    {"role": "tool", "content": [{"type": "tool_result", "value": "a", "name": "c"}], "name": "d"},
                    ANSWER,
                ]
            },
            (),
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_call", "value": {**CALL, "n": 1}}]}]},
            ("messages[].content[].value.n",),
        ),
    ],
)
def test_unread_keys_are_named(record, unread):
    assert to_conversation(record, "").unread == unread


RECORD_KEYS = {
    "system": "a",
    "system_prompt": "a",
    "tools": [{"name": "f"}],
    "functions": [{"name": "f"}],
    "history": [["a", "b"]],
    "reasoning": "a",
    "reasoning_content": "a",
    "thinking": "a",
    "images": ["a"],
    "messages": [USER, ANSWER, USER, ANSWER],
}
TURN_KEYS = {
    "reasoning": "a",
    "reasoning_content": "a",
    "thinking": "a",
    "images": ["a"],
    "tool_calls": [CALL],
    "function_call": CALL,
    "tool_call_id": "a",
    "train": False,
    "weight": 0,
    "loss": 0,
    "trainable": 0,
    "loss_mask": 0,
    "mask": 0,
    "id": 1,
    "name": "a",
}


def outcome(record):
    """Return the conversation and the keys that are not read, None where the record is an error."""
    try:
        conversation = to_conversation(record, "")
    except DataError:
        return None, ()
    return conversation, conversation.unread


@pytest.mark.parametrize(("key", "value"), [*RECORD_KEYS.items(), ("id", 1), ("input", "a"), ("rejected", "a")])
def test_key_of_a_record_has_an_effect_or_is_named(key, value):
    conversation, unread = outcome({**PAIR, key: value})
    assert (conversation != to_conversation(PAIR, "")) or unread == (key,)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize(("key", "value"), [*TURN_KEYS.items(), ("tools", [{"name": "f"}])])
def test_key_of_a_turn_has_an_effect_or_is_named(role, key, value):
    turn = {"role": role, "content": "Hi"}
    conversation, unread = outcome({"messages": [{**turn, key: value}, ANSWER]})
    without = to_conversation({"messages": [turn, ANSWER]}, "")
    switched_off_anyway = role != "assistant" and value in (False, 0)
    assert conversation != without or unread == (f"messages[].{key}",) or switched_off_anyway


RECORDS = [
    {**PAIR, "id": 1},
    {"messages": [USER, ANSWER], "id": 2, "<b>": "x"},
    {"prompt": "a", "response": "<think>hm"},
    {"prompt": "b", "response": "<think>hm</think>\n"},
    {"prompt": "c", "response": "<think>hm</think>\nYes"},
    {"messages": [USER, {"role": "assistant", "content": "<think>hm", "train": False}, USER, ANSWER]},
]


def test_remarks_are_shown_at_the_start_and_in_the_preview(tokenizer, cache_dir, tmp_path):
    path = write(tmp_path / "a.json", RECORDS)
    store = build(path, tokenizer, cache_dir)
    assert TokenStore.open(store.folder).report == store.report
    assert store.report.remarks.unread == {"id": 2, "<b>": 1}
    unread = "keys that are not read: id (2 records), <b> (1 record)"
    open_, only = (
        f"never closed; the model is trained to leave it open: {path}, record 3",
        f"after it: {path}, record 4",
    )
    notices = "\n".join(data_notices(store.report, "train", DataConfig(), tmp_path))
    stats = DatasetStats()
    stats.read(
        [to_conversation(record, f"{path}, record {n}") for n, record in enumerate(RECORDS, 1)], Renderer(tokenizer)
    )
    assert stats.remarks == store.report.remarks
    for text in (notices, "\n".join(summary(stats))):
        assert unread in text and open_ in text and only in text
        assert "1 record with a <think>" in text and "1 record with reasoning without an answer" in text
    html = page(stats, Renderer(tokenizer), "data", "model")
    assert "keys that are not read: id (2 records), &lt;b&gt; (1 record)." in html and only in html


def test_reasoning_key_without_an_answer_is_trained_on_and_named(tokenizer):
    conversation = to_conversation(
        {"messages": [USER, {**ANSWER, "content": "", "reasoning": "hm"}]}, "a.json, record 1"
    )
    remarks = Remarks()
    remarks.add(conversation)
    assert remarks.only_reasoning.sources == ["a.json, record 1"]


def test_remarks_of_chunks_add_up_and_stay_small():
    total, expected = Remarks(), Remarks()
    for number in range(3 * MAX_KEYS):
        record = {"prompt": "a", "response": "<think>hm", f"key{number}": 1}
        conversation, chunk = to_conversation(record, f"record {number}"), Remarks()
        chunk.add(conversation)
        expected.add(conversation)
        total.merge(chunk)
    assert total == expected
    assert len(total.unread) == MAX_KEYS + 1 and sum(total.unread.values()) == 3 * MAX_KEYS
    named = next(total.sentences())
    assert named.startswith(f"keys that are not read: {OTHER_KEYS} ({2 * MAX_KEYS} records), key0 (1 record), key1 (1")
    assert named.endswith(f"key18 (1 record) and {MAX_KEYS + 1 - 20} more")
    assert total.open_reasoning.count == 3 * MAX_KEYS
    assert total.open_reasoning.sources == ["record 0", "record 1", "record 2"]


def test_rejected_answers_are_counted():
    remarks = Remarks()
    for record in (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": [ANSWER]},
    ):
        remarks.add(to_conversation(record, ""))
    expected = "2 records with a rejected answer, which is not used: the chosen one is trained on"
    assert list(remarks.sentences()) == [expected]
    remarks.add(to_conversation({"prompt": "a", "chosen": "b", "rejected": "", "id": 1}, ""))
    assert list(remarks.sentences()) == ["keys that are not read: id (1 record)", expected]
