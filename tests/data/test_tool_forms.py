"""The same conversation with tools, as OpenAI, Anthropic, Hermes and ShareGPT write it, is one conversation."""

import json

import pytest

from sft_recipe.data.formats import to_conversation
from sft_recipe.data.messages import Message
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.tool_forms import with_hermes_calls
from sft_recipe.data.turns import Turn
from sft_recipe.errors import DataError
from tests.data.rendering.oracles import TOKENIZERS
from tests.data.stores import build, examples, write
from tests.support import tiny

TOKENIZER = TOKENIZERS["qwen3", "bytes"]
PARAMETERS = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}}
SCHEMA = {"name": "add", "description": "Adds.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": SCHEMA}]
FIRST, SECOND = {"b": 2, "a": 1}, {"b": None, "a": 4}
CALLS = [{"name": "add", "arguments": arguments} for arguments in (FIRST, SECOND)]
QUESTION, TEXT, ANSWER = "1 + 2 and 4?", "I add.", "3 and 4."


def openai(order=(0, 1)):
    calls = [
        {"id": f"c{n}", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
        for n, call in enumerate(CALLS)
    ]
    results = [{"role": "tool", "tool_call_id": f"c{n}", "content": str(n + 3)} for n in order]
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": TEXT, "tool_calls": calls},
        *results,
        {"role": "assistant", "content": ANSWER},
    ]
    return {"messages": turns, "tools": TOOLS}


def anthropic(order=(0, 1)):
    uses = [{"type": "tool_use", "id": f"c{n}", "name": "add", "input": c["arguments"]} for n, c in enumerate(CALLS)]
    results = [
        {"type": "tool_result", "tool_use_id": f"c{n}", "content": [{"type": "text", "text": str(n + 3)}]}
        for n in order
    ]
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [{"type": "text", "text": TEXT}, *uses]},
        {"role": "user", "content": results},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    tool = {"input_schema" if key == "parameters" else key: value for key, value in SCHEMA.items()}
    return {"messages": turns, "tools": [tool]}


def hermes():
    calls = "".join(f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in CALLS)
    results = "\n".join(f"<tool_response>\n{n}\n</tool_response>" for n in (3, 4))
    turns = [("human", QUESTION), ("gpt", TEXT + calls), ("tool", results), ("gpt", ANSWER)]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps(TOOLS)}


def sharegpt():
    turns = [("human", QUESTION), ("gpt", TEXT), ("function_call", json.dumps(CALLS)), ("observation", "3")]
    turns += [("observation", "4"), ("gpt", ANSWER)]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps([SCHEMA])}


FORMS = {"openai": openai(), "anthropic": anthropic(), "hermes": hermes(), "sharegpt": sharegpt()}
UNORDERED = {"openai": openai((1, 0)), "anthropic": anthropic((1, 0))}


@pytest.mark.parametrize(
    "record", [*FORMS.values(), *UNORDERED.values()], ids=[*FORMS, *map("{} 1, 0".format, UNORDERED)]
)
def test_every_form_is_rendered_as_the_template_renders_one(tmp_path, cache_dir, record):
    turns = [
        {**turn, "tool_calls": CALLS_OF_TEMPLATE} if "tool_calls" in turn else turn for turn in openai()["messages"]
    ]
    ids = TOKENIZER.apply_chat_template(turns, tools=TOOLS, tokenize=True, return_dict=False)
    text = TOKENIZER.decode(ids)
    assert text.index('"b": 2, "a": 1') < text.index('"b": null') < text.index(">\n3\n<") < text.index(">\n4\n<")
    store = build(write(tmp_path / "a.json", [record]), TOKENIZER, cache_dir)
    [(found, mask)] = examples(store)
    assert found == ids and sum(mask) > 0
    assert to_conversation(record, "").unread == ()


CALLS_OF_TEMPLATE = [{"type": "function", "function": call} for call in CALLS]


@pytest.mark.parametrize("name", FORMS)
def test_a_conversation_written_in_our_form_is_the_same(name):
    conversation = to_conversation(FORMS[name], "")
    assert to_conversation(conversation.as_record(), "") == conversation
    assert conversation.tools == tuple(TOOLS)


def test_anthropic_thinking_and_system_parts():
    parts = [{"type": "thinking", "thinking": "Easy.", "signature": "s"}, {"type": "text", "text": "4"}]
    record = {"system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    record["messages"] = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": parts}]
    conversation = to_conversation(record, "")
    assert conversation.messages[0] == Message("system", "Be brief.")
    assert conversation.messages[2] == Message("assistant", "4", reasoning="Easy.")
    assert conversation.unread == ("messages[].content[].signature",)


@pytest.mark.parametrize(
    "content",
    [
        "Write <tool_call> like this.",
        "Write {} between <tool_call> and </tool_call>",
        "<tool_call>\n<function=add>\n</function>\n</tool_call>",
        "With <tool_call>{'name': 'add'}</tool_call> I add.",
        'Begin with <tool_call>{"name": ...',
        '<tool_call>{"name": "add"}</tool_call> is a call.',
        "<tool_call>[x]</tool_call> is none.",
    ],
)
def test_a_text_that_is_no_call_stays_text(content):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    assert to_conversation({"messages": turns, "tools": TOOLS}, "").messages[1] == Message("assistant", content)


GOOD = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ('{"name": "add", "arguments": {bad}}', "has a <tool_call> that is not JSON"),
        ('{"name": "add", "arguments": {"a": 1}', "has a <tool_call> that is not JSON"),
        ("{'name': 'add', 'arguments': {}}", "not JSON, which has double quotes, true, false and null: \"{'name'"),
        ('{"a": 1}', "is not a tool call; expected an object with name and arguments"),
        ('{"name": "add", "arguments": 3}', "arguments is a number; expected an object"),
    ],
)
@pytest.mark.parametrize("before", ["", "I add.\n", GOOD, f"{GOOD}\nAnd "])
def test_a_call_in_tags_that_cannot_be_used_is_an_error(before, inside, expected):
    content = f"{before}<tool_call>\n{inside}\n</tool_call>\n"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    with pytest.raises(DataError) as caught:
        to_conversation({"messages": turns, "tools": TOOLS}, "a.json, record 1")
    assert str(caught.value).startswith("a.json, record 1: messages[1].content") and expected in str(caught.value)


@pytest.mark.parametrize(
    "call", ['{"name": "add", "arguments": {}}', '{"name": "a', '[{"name": "add"}]</tool_call>\n', '[{"name": "add"']
)
@pytest.mark.parametrize("before", ["", "I add.\n", f"{GOOD}\n"])
@pytest.mark.parametrize("after", ["", f"\n{GOOD}"])
def test_a_call_that_is_not_closed_and_a_list_of_calls_are_errors(before, call, after):
    """A text that was cut, as by a limit of tokens, would be trained on as an answer."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"{before}<tool_call>\n{call}{after}"}]
    with pytest.raises(DataError) as caught:
        to_conversation({"messages": turns, "tools": TOOLS}, "a.json, record 1")
    expected = f"messages[1].content has a <tool_call> that is not closed, or a list: {call.rstrip()!r}; write each"
    assert expected in str(caught.value)


def test_a_text_between_two_calls_is_kept_and_an_argument_may_spell_the_end():
    call = {"name": "add", "arguments": {"a": "}</tool_call> b"}}
    content = f"{GOOD} and <tool_call>\n{json.dumps(call)}\n</tool_call>"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    message = to_conversation({"messages": turns, "tools": TOOLS}, "").messages[1]
    assert message == Message("assistant", f"{GOOD} and", tool_calls=({"type": "function", "function": call},))


def test_calls_in_a_text_stay_text_without_tools():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": FORMS["hermes"]["conversations"][1]["value"]},
    ]
    conversation = to_conversation({"messages": turns}, "")
    assert conversation.messages[1].content == turns[1]["content"] and not conversation.messages[1].tool_calls


def test_results_without_tools_are_wrapped_once():
    record = {key: value for key, value in hermes().items() if key != "tools"}
    turns = [("user", QUESTION), ("assistant", record["conversations"][1]["value"]), ("tool", "3"), ("tool", "4")]
    turns = [{"role": role, "content": text} for role, text in [*turns, ("assistant", ANSWER)]]
    encoded = Renderer(TOKENIZER).encode(to_conversation(record, ""))
    assert encoded.input_ids == TOKENIZER.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert TOKENIZER.decode(encoded.input_ids).count("<tool_response>") == 2


@pytest.mark.parametrize(
    ("tokenizer", "content"),
    [
        (tiny.build_tokenizer(tiny.CHATML), "<tool_response>\n3\n</tool_response>"),
        (TOKENIZER, "It says <tool_response>\n3\n</tool_response>"),
    ],
    ids=["the template writes no tags", "the tags are a part of the text"],
)
def test_tags_of_results_stay(tokenizer, content):
    turns = [{"role": role, "content": text} for role, text in (("user", "3?"), ("tool", content), ("assistant", "3"))]
    encoded = Renderer(tokenizer).encode(to_conversation({"messages": turns}, ""))
    assert encoded.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert content in tokenizer.decode(encoded.input_ids)


def test_results_that_name_no_call_keep_their_order():
    record = openai((1, 0))
    record["messages"][2]["tool_call_id"] = "other"
    assert [m.content for m in to_conversation(record, "").messages if m.role == "tool"] == ["4", "3"]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "tool_result", "tool_use_id": "c", "content": 3}, "content is a number; expected text"),
        (
            {"type": "tool_result", "content": [{"type": "image"}]},
            "content[0] is a part of type 'image'; expected a text",
        ),
        ({"type": "tool_result", "content": ["a"]}, "content[0] is text; expected a text part"),
        ({"type": "tool_use", "input": {}}, "is not a tool call; expected an object with name and arguments"),
        ({"type": "tool_use", "name": "f", "input": 3}, "arguments is a number; expected an object"),
        ({"type": "thinking"}, "text is null; expected text"),
        (
            {"type": "redacted_thinking", "data": "x"},
            "type is 'redacted_thinking'; expected reasoning, text, tool_call",
        ),
    ],
)
def test_a_part_that_cannot_be_used_is_an_error(part, expected):
    role = "user" if part["type"] == "tool_result" else "assistant"
    with pytest.raises(DataError) as caught:
        to_conversation({"messages": [{"role": role, "content": [part]}]}, "a.json, record 1")
    assert str(caught.value).startswith("a.json, record 1: messages[0].content[0]") and expected in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_a_result_may_be_empty(content):
    part = {"type": "tool_result", "tool_use_id": "c1", **content}
    ours = {"type": "tool_result", "value": "", "tool_call_id": "c1"}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "Done."}]
    assert to_conversation({"messages": turns}, "").messages[0] == Message("tool", "", tool_call_id="c1")
    turns[0] = {"role": "user", "content": [ours]}
    assert to_conversation({"messages": turns}, "").messages[0] == Message("tool", "", tool_call_id="c1")


def test_a_renderer_shows_the_forms_alike():
    encoded = Renderer(TOKENIZER).encode_batch([to_conversation(record, "") for record in FORMS.values()])
    assert all(item == encoded[0] for item in encoded)


@pytest.mark.parametrize(
    "text", ["use <tool_call> here", "a</tool_call><tool_call>{b", "<tool_call>{}</tool_call> here", 'a " </tool_call>']
)
def test_arguments_may_have_the_tags_of_a_call(text):
    call = {"name": "write", "arguments": {"text": text}}
    content = f"Yes.\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
    [turn] = with_hermes_calls([Turn("messages[1]", Message("assistant", content))], "")
    assert turn.message.content == "Yes."
    assert [found["function"]["arguments"] for found in turn.message.tool_calls] == [{"text": text}]


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("assistant", '<tool_call>{"' * 10_000 + "Yes"),
        ("assistant", "<tool_call>{" + ("</tool_call>" + " " * 1_000) * 200 + "Yes"),
        ("assistant", "\n" * 200_000 + "Yes"),
        ("assistant", '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n' * 5_000 + "Yes"),
        ("assistant", "<tool_call>{" + " " * 200_000 + "Yes"),
        ("tool", "<tool_response>4</tool_response>" * 5_000 + "Yes"),
        ("tool", "<tool_response>4</tool_response> and <tool_response>5</tool_response>"),
    ],
)
def test_texts_that_are_no_call_and_no_result_stay_as_they_are_at_once(role, content):
    turns = [Turn("messages[1]", Message(role, content))]
    assert [turn.message.content for turn in with_hermes_calls(turns, "")] == [content]
