"""Whatever JSON a record is, it becomes a conversation, which survives a round trip, or a DataError."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_recipe.data.columns import Columns
from sft_recipe.data.formats import FORMATS, TEMPLATE_KEY, to_conversation
from sft_recipe.data.remarks import Remarks
from sft_recipe.data.turns import ARGUMENT_KEYS, CALL_KEYS, LOSS_KEYS, MEDIA_KEYS, REASONING_KEYS, TOOL_KEYS
from sft_recipe.errors import DataError

scalars = st.none() | st.booleans() | st.sampled_from([0, 1, -1, 0.5, float("nan"), float("inf"), 10**30])
words = st.sampled_from(
    ["a", "", " ", "<think>b", "<think>b</think>", "\ud83d", "[]", '["a"]', '{"a": 1, "a": 2}', "["]
)
names = ["role", "content", "from", "value", "type", "text", "name", "tool_call_id", "id", "function", "note"]
names += [*LOSS_KEYS, *REASONING_KEYS, *CALL_KEYS, *TOOL_KEYS, *ARGUMENT_KEYS, *MEDIA_KEYS[:1]]
fields = sorted({field for format in FORMATS.values() for field in format.fields})
extras = ["history", "system", "system_prompt", "input", "rejected", TEMPLATE_KEY, *TOOL_KEYS, *REASONING_KEYS, *fields]


def objects(keys, values, max_size=4):
    return st.dictionaries(st.sampled_from(keys), values, max_size=max_size)


values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | objects(names, inner) | objects(names, inner).map(json.dumps),
    max_leaves=12,
)
calls = st.fixed_dictionaries({"name": st.just("f"), "arguments": objects(["a"], values) | values})
texts = st.sampled_from(["a", "b\n", " c ", "<think>d</think>e", "<think>f"])
parts = st.builds(lambda kind, text: {"type": kind, "text": text}, st.sampled_from(["text", "reasoning"]), texts)
parts |= calls.map(lambda call: {"type": "tool_call", "value": call})
parts |= texts.map(lambda text: {"type": "tool_result", "value": text})
contents = texts | st.lists(parts, min_size=1, max_size=2)
likely = {"weight": st.sampled_from([0, 1, None]), "reasoning": texts, "tool_calls": st.lists(calls, max_size=2)}
likely |= {"tool_call_id": texts, "name": texts, "note": values}
roles = st.sampled_from(["user", "assistant", "tool", "human", "gpt", "function_call"])


def sometimes(strategy, otherwise):
    return st.integers(0, 5).flatmap(lambda number: otherwise if number else strategy)


def with_some(record, extra):
    return st.builds(lambda one, other: one | other, record, sometimes(extra, st.just({})))


turns = st.builds(
    lambda role, content, more: {"role": role, "content": content} | more,
    roles,
    contents,
    st.one_of(
        st.just({}), st.sampled_from(list(likely)).flatmap(lambda key: likely[key].map(lambda value: {key: value}))
    ),
)
turns = with_some(turns, objects(names, values, 2))
lists = st.lists(turns, min_size=1, max_size=3).map(lambda found: [*found, {"role": "assistant", "content": "z"}])
system = st.builds(
    lambda tools: {"role": "system", "content": "s", "tools": tools}, st.lists(objects(["name"], texts), max_size=2)
)
lists |= st.builds(lambda first, rest: [first, *rest], system, lists)
answers = texts | lists
formats = st.one_of(
    st.fixed_dictionaries({"messages": lists | lists.map(json.dumps)}),
    st.fixed_dictionaries({"prompt": answers, "response": answers}),
    st.fixed_dictionaries({"instruction": texts, "output": answers}, optional={"history": st.just([["q", "a"]])}),
    st.fixed_dictionaries({"prompt": answers, "chosen": answers}, optional={"messages": lists}),
)
usual = {
    "reasoning": texts,
    "system": texts,
    "tools": st.just([{"name": "f"}]),
    TEMPLATE_KEY: objects(["a", "tools"], values),
}
formats = with_some(
    formats, st.sampled_from(list(usual)).flatmap(lambda key: usual[key].map(lambda value: {key: value}))
)
records = with_some(formats, objects(extras, values, 2))


@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(record=records | values)
def test_any_record_is_a_conversation_or_a_data_error(record):
    try:
        conversation = to_conversation(Columns({"role": "note"}).rename(record, "a"), "a")
    except DataError as error:
        assert str(error).startswith("a: ") and "\n" not in str(error)
        return
    Remarks().add(conversation)
    again = to_conversation(json.loads(json.dumps(conversation.as_record())), "a")
    assert json.dumps(again.as_record()) == json.dumps(conversation.as_record())
    assert again.unread == ()
