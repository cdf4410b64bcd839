"""Templates that end a turn with the marker of the next role: it ends the turn, and is appended to the last one."""

import json

import numpy as np
import pytest

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.pipeline import open_store
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.data.split_turns import split_turns
from sft_recipe.data.token_store import Examples, StoreOptions
from sft_recipe.errors import DataError, ModelError
from sft_recipe.models.families import CAUSAL
from tests.data.rendering.oracles import own_ids
from tests.support import tiny

MARKERS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM = (
    "[gMASK]<sop>{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}"
    "{{ '\n' + m.content }}{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '\n' + call.function.name + '\n' }}{{ call.function.arguments | tojson }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Markers of roles are text; the models were trained to end answers with eos.
TEXT_MARKERS = (
    "{% for m in messages %}{{ ('<USER>' + m.content + '<AI>') if m.role == 'user' else m.content }}{% endfor %}"
)
CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"a": "</x>"}}}
SYSTEM, USER, ANSWER = Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello there.")
CALLS, RESULT = Message("assistant", "", tool_calls=(CALL, CALL)), Message("tool", "7", tool_call_id="c1")
CALLED = '\nf\n{"a": "</x>"}\nf\n{"a": "</x>"}'


def tokenizer_of(template, **kwargs):
    return tiny.build_tokenizer(template, MARKERS, "<|endoftext|>", **kwargs)


def supervised(tokenizer, encoded):
    """The text of each run of supervised tokens."""
    runs, before = [], 0
    for token, bit in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if bit and not before:
            runs.append([])
        if bit:
            runs[-1].append(token)
        before = bit
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, ANSWER], ["Hello there.<|user|>"]),
        ([SYSTEM, USER, ANSWER, USER, ANSWER], ["Hello there.<|user|>"] * 2),
        ([USER, CALLS], [f"{CALLED}<|observation|>"]),
        ([USER, CALLS, RESULT, RESULT, ANSWER], [f"{CALLED}<|observation|>", "Hello there.<|user|>"]),
        ([USER, CALLS, USER, ANSWER], [f"{CALLED}<|user|>", "Hello there.<|user|>"]),
        ([USER, ANSWER, USER], ["Hello there.<|user|>"]),
        ([USER, Message("assistant", " Hi. \n")], [" Hi. \n<|user|>"]),
        ([USER, CALLS, RESULT], [f"{CALLED}<|observation|>"]),
    ],
)
def test_each_turn_ends_with_the_marker_at_which_generation_stops(messages, expected):
    tokenizer = tokenizer_of(GLM)
    conversation = Conversation(tuple(messages))
    encoded = Renderer(tokenizer).encode(conversation)
    own = own_ids(tokenizer, conversation)
    if messages[-1].role == "assistant":
        own.append(tokenizer.convert_tokens_to_ids("<|observation|>" if messages[-1] is CALLS else "<|user|>"))
    assert encoded.input_ids == own
    assert supervised(tokenizer, encoded) == expected


def test_data_that_spells_a_marker_stays_text():
    tokenizer = tokenizer_of(GLM)
    conversation = Conversation((USER, Message("assistant", "Say <|user|> and <|observation|>.")))
    encoded = Renderer(tokenizer).encode(conversation)
    assert encoded.has_special_text and encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 2
    assert supervised(tokenizer, encoded) == ["Say <|user|> and <|observation|>.<|user|>"]


def test_without_the_stop_token_the_ids_are_those_of_the_template():
    tokenizer = tokenizer_of(GLM)
    conversation = Conversation((USER, ANSWER, USER, ANSWER))
    encoded = Renderer(tokenizer, options=RenderOptions(append_stop_token=False)).encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation)
    assert supervised(tokenizer, encoded) == ["Hello there.<|user|>", "Hello there."]


def test_a_turn_without_a_stop_token_is_context_at_most():
    renderer = Renderer(tokenizer_of(GLM))
    with pytest.raises(DataError, match=r"no token after messages\[1\] .* data.split_turns=true makes an example"):
        renderer.encode(Conversation((USER, ANSWER, ANSWER)))
    context = Message("assistant", "Hello there.", train=False)
    encoded = renderer.encode(Conversation((USER, context, ANSWER)))
    assert supervised(renderer.tokenizer, encoded) == ["Hello there.<|user|>"]


def test_markers_that_are_text_leave_eos_to_end_the_last_turn():
    tokenizer = tokenizer_of(TEXT_MARKERS)
    conversation = Conversation((USER, ANSWER, USER, ANSWER))
    with pytest.raises(DataError, match="data.split_turns=true"):
        Renderer(tokenizer).encode(conversation)
    for part in split_turns(conversation):
        encoded = Renderer(tokenizer).encode(part)
        assert encoded.input_ids == [*own_ids(tokenizer, part), tokenizer.eos_token_id]
        assert supervised(tokenizer, encoded) == ["Hello there.<|endoftext|>"]


@pytest.mark.parametrize(
    "template",
    [
        TEXT_MARKERS.replace("else m.content", "else m.content + '\n'"),  # before or after the end?
        GLM.replace("'<|' + m.role", "'\n<|' + m.role"),  # the same: does the line end belong to the turn?
        GLM.replace("m.content }}{% for", "m.content + '\n' }}{% for"),
        "{% for m in messages %}{{ '[gMASK]' + m.role + ':' + m.content + '\n' }}{% endfor %}",  # bos ends nothing
    ],
)
def test_an_uncertain_end_is_an_error(template):
    with pytest.raises((ModelError, DataError)):
        Renderer(tokenizer_of(template, bos_token="[gMASK]")).encode(Conversation((USER, ANSWER)))


def stop_tokens(tmp_path, template, *conversations):
    tokenizer = tokenizer_of(template)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(Conversation(tuple(c)).as_record()) + "\n" for c in conversations))
    store = open_store([path], tokenizer, StoreOptions(), tmp_path / "cache", workers=1)
    inputs = RunInputs(None, CAUSAL, tokenizer, Examples(store, np.arange(len(store))), {}, [])
    return tokenizer.convert_ids_to_tokens(inputs.stop_token_ids())


def test_generation_stops_at_the_markers_after_calls_too(tmp_path):
    assert stop_tokens(tmp_path, GLM, [USER, CALLS, RESULT, ANSWER]) == ["<|user|>", "<|observation|>"]
    assert stop_tokens(tmp_path, GLM, [USER, ANSWER, USER, ANSWER]) == ["<|user|>"]


def test_a_token_that_ends_earlier_turns_alone_is_no_stop_token(tmp_path):
    """As in templates that end only the last turn of a conversation with eos."""
    ends = "{{ '<|endoftext|>' if loop.last else '<|system|>' }}"
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}" + ends + "{% endfor %}"
    template = template.replace("m.content }}", "m.content }}{% if m.role == 'user' %}<|system|>{% else %}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert stop_tokens(tmp_path, template, [USER, ANSWER, USER, ANSWER]) == ["<|endoftext|>"]
