"""Sources and targets of encoder-decoder models: what the tokenizer encodes, and an end token where it adds none."""

import pytest

from sft_recipe.data.formats import to_conversation
from sft_recipe.data.rendering.options import RenderOptions
from sft_recipe.data.rendering.source_target import SourceTargetRenderer
from sft_recipe.errors import DataError, ModelError
from tests.support import seq2seq, tiny

EOS, BOS = 1, 2
PAIR = {"prompt": "What is the capital of France?", "response": "Paris."}
TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "1 2 3"},
        {"role": "assistant", "content": "4 5 6"},
        {"role": "user", "content": "Thanks"},
    ]
}


def encode(record, adds="$A </s>", **settings):
    encoded = SourceTargetRenderer(seq2seq.build_tokenizer(adds), **settings).encode(to_conversation(record, "a.json"))
    length = encoded.source_length
    assert encoded.loss_mask == [0] * length + [1] * (len(encoded.input_ids) - length)
    return encoded.input_ids[:length], encoded.input_ids[length:]


def ids(text):
    return seq2seq.build_tokenizer("$A")(text)["input_ids"]


@pytest.mark.parametrize(
    "adds, start, before, before_target",
    [
        ("$A </s>", None, [], []),
        ("$A", 0, [], []),
        ("<s> $A </s>", EOS, [BOS], [BOS]),
        ("<s> $A", BOS, [BOS], []),
    ],
)
def test_both_have_the_tokenizers_special_tokens_and_end_with_eos(adds, start, before, before_target):
    source, target = encode(PAIR, adds, decoder_start_id=start)
    assert source == [*before, *ids(PAIR["prompt"]), EOS]
    assert target == [*before_target, *ids(PAIR["response"]), EOS]


def test_the_last_answer_is_the_target_of_all_before_it():
    source, target = encode(TURNS)
    assert source == [*ids("Be brief.\nHello\nHi.\n1 2 3"), EOS]
    assert target == [*ids("4 5 6"), EOS]


def test_the_last_answer_that_is_trained_on_is_the_target():
    turns = [dict(turn) for turn in TURNS["messages"]]
    turns[4]["train"] = False
    assert encode({"messages": turns})[1] == [*ids("Hi."), EOS]


def test_reasoning_is_a_part_of_the_answer():
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    assert encode({"messages": [TURNS["messages"][1], answer]})[1] == [*ids("<think>\n2 + 2\n</think>\n\n4"), EOS]


def test_data_that_spells_a_special_token_is_text():
    record = {"prompt": "What does </s> mean?", "response": "It ends.</s>"}
    source, target = encode(record)
    assert source.count(EOS) == target.count(EOS) == 1
    assert seq2seq.build_tokenizer("$A").decode(target[:-1]) == record["response"]
    parsed, _ = encode(record, options=RenderOptions(parse_special_tokens=True))
    assert parsed.count(EOS) == 2


def test_a_chat_template_makes_the_source():
    tokenizer = tiny.build_tokenizer()
    renderer = SourceTargetRenderer(tokenizer)
    encoded = renderer.encode(to_conversation(TURNS, "a.json"))
    expected = tokenizer.apply_chat_template(TURNS["messages"][:4], add_generation_prompt=True)["input_ids"]
    assert encoded.input_ids[: encoded.source_length] == [*expected, tokenizer.eos_token_id]
    assert encoded.input_ids[encoded.source_length :] == [*tokenizer("4 5 6")["input_ids"], tokenizer.eos_token_id]
    assert renderer.encode_source(TURNS["messages"][:4]).ids == encoded.input_ids[: encoded.source_length]


def test_tools_are_refused():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [TURNS["messages"][1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match="a.json: it has tools or tool calls"):
        encode({"messages": turns})


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = seq2seq.build_tokenizer("$A")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no eos token"):
        SourceTargetRenderer(tokenizer)
