"""data.split_turns: each supervised turn is an example whose context is the prompt of inference, token for token."""

import pytest

from sft_recipe.config.schema import DataConfig
from sft_recipe.config.validation import build_config
from sft_recipe.data.batching import split_validation
from sft_recipe.data.formats import to_conversation
from sft_recipe.data.messages import Conversation
from sft_recipe.data.notices import data_notices
from sft_recipe.data.preview.stats import DatasetStats
from sft_recipe.data.preview.terminal import summary
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.split_turns import split_turns
from sft_recipe.errors import ConfigError
from tests.data.rendering.oracles import TOKENIZERS
from tests.data.stores import build, examples, write

TOKENIZER = TOKENIZERS["qwen3", "bytes"]  # drops the reasoning of earlier turns
USER = {"role": "user", "content": "What is 1 2 3?"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def answer(text, **fields):
    return {"role": "assistant", "content": text, "reasoning_content": f"Because {text}"} | fields


def record(*turns, **fields):
    return {"messages": list(turns), **fields}


TALK = record(
    {"role": "system", "content": "Be brief."}, USER, answer("one"), USER, answer("two"), USER, answer("three")
)
TOOLS = record(
    USER,
    answer("", tool_calls=[CALL]),
    {"role": "tool", "content": "7"},
    answer("four"),
    USER,
    answer("five"),
    tools=[TOOL],
)
SOME = record(USER, answer("six", train=False), USER, answer("seven"), USER)


def expected(given):
    """Each supervised turn from transformers alone: the prompt of inference, then what the answer adds to it."""
    found = []
    for index, turn in enumerate(given["messages"]):
        if turn["role"] != "assistant" or turn.get("train") is False:
            continue
        kwargs = {"tools": given.get("tools"), "tokenize": True, "return_dict": False}
        before = given["messages"][:index]
        prompt = TOKENIZER.apply_chat_template(before, add_generation_prompt=True, **kwargs)
        ids = TOKENIZER.apply_chat_template([*before, turn], **kwargs)
        assert ids[: len(prompt)] == prompt
        end = max(place for place, token in enumerate(ids) if token == TOKENIZER.eos_token_id) + 1
        found.append((ids, [0] * len(prompt) + [1] * (end - len(prompt)) + [0] * (len(ids) - end)))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_each_example_is_a_prompt_of_inference_and_its_answer(tmp_path, cache_dir, pools, workers):
    records = [TALK, TOOLS, SOME] * 4
    store = build(write(tmp_path / "a.json", records), TOKENIZER, cache_dir, workers, split_turns=True)
    assert examples(store) == [example for given in records for example in expected(given)]
    assert len(pools) == (workers > 1)


def test_reasoning_of_every_turn_is_trained_on(tmp_path, cache_dir):
    path = write(tmp_path / "a.json", [TALK])
    report = build(path, TOKENIZER, cache_dir, split_turns=True).report
    assert (report.examples, report.earlier_without_reasoning) == (3, 0)
    assert data_notices(report, "train", DataConfig(train_files=str(path)), tmp_path) == []
    dropped = build(path, TOKENIZER, cache_dir).report
    [notice] = data_notices(dropped, "train", DataConfig(train_files=str(path)), tmp_path)
    assert dropped.earlier_without_reasoning == 2 and "data.split_turns=true makes an example of each answer" in notice
    assert data_notices(dropped, "train", DataConfig(train_files=str(path), split_turns=False), tmp_path) == []


def test_a_conversation_is_on_one_side_of_a_split(tmp_path, cache_dir):
    records = [record(USER, answer(f"first {n}"), USER, answer("second"), USER, answer(f"{n}")) for n in range(30)]
    store = build(write(tmp_path / "a.json", [*records, records[0]]), TOKENIZER, cache_dir, split_turns=True)
    train, validation = split_validation(store.groups, 0.3, 0)
    sides = [{place // 3 % 30 for place in part} for part in (train, validation)]
    assert not sides[0] & sides[1] and len(sides[1]) == 9


def test_unread_keys_are_counted_once_and_a_conversation_without_loss_is_left():
    conversation = to_conversation({**TALK, "id": 7}, "a.json, record 1")
    parts = list(split_turns(conversation))
    assert [part.unread for part in parts] == [(), (), ("id",)]
    assert {part.source for part in parts} == {"a.json, record 1"}
    silent = to_conversation(record(USER, answer("x", train=False)), "")
    assert list(split_turns(silent)) == [silent]


def test_preview_says_what_is_repeated():
    stats = DatasetStats()
    parts = [
        part for n, given in enumerate((TALK, SOME)) for part in split_turns(to_conversation(given, f"record {n}"))
    ]
    stats.read(parts, Renderer(TOKENIZER))
    lengths = [len(ids) for ids, _ in expected(TALK)]
    [line] = [line for line in summary(stats) if "split_turns" in line]
    assert f"of 2 conversations; about {sum(lengths[:2]):,} tokens" in line


def test_single_turn_conversations_are_unchanged():
    conversation = to_conversation({"prompt": "Hi", "response": "Hello."}, "")
    assert list(split_turns(conversation)) == [conversation]
    assert all(isinstance(part, Conversation) for part in split_turns(conversation))


def test_one_key_chooses_the_turns():
    with pytest.raises(ConfigError, match="split_turns makes an example of every assistant turn, train_on=last of one"):
        data = {"split_turns": True, "train_on": "last"}
        build_config({"model": {}, "data": data, "optim": {}, "fsdp": {}, "lora": {}})
