"""A record's chat_template_kwargs reach the template, and only the rendering of that record."""

import json

import pytest

from sft_recipe.data.formats import to_conversation
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.errors import DataError, ModelError
from tests.data.rendering.oracles import own_ids
from tests.support import tiny

STYLE_TEMPLATE = tiny.CHATML.replace("{% for", "{{ '<|im_start|>style ' ~ style|default('plain') }}{% for", 1)
PAIR = {"prompt": "Hi", "response": "Hello there."}


def supervised(tokenizer, encoded):
    return tokenizer.decode([token for token, bit in zip(encoded.input_ids, encoded.loss_mask, strict=True) if bit])


def test_variables_of_each_record_reach_the_template():
    tokenizer = tiny.build_tokenizer(STYLE_TEMPLATE)
    renderer = Renderer(tokenizer)
    given = [{}, {"style": "terse"}, {"style": "kind"}, {}, {"style": "terse", "unknown": "", "enable_thinking": False}]
    conversations = [to_conversation({**PAIR, "chat_template_kwargs": variables}, "") for variables in given]
    for variables, conversation, encoded in zip(
        given, conversations, renderer.encode_batch(conversations), strict=True
    ):
        assert encoded.input_ids == own_ids(tokenizer, conversation, **variables)
        assert supervised(tokenizer, encoded) == "Hello there.<|im_end|>"


@pytest.mark.parametrize("option", [None, True, False])
@pytest.mark.parametrize("value", [True, False])
def test_record_overrides_the_thinking_switch_of_the_run(option, value):
    tokenizer = tiny.build_tokenizer(STYLE_TEMPLATE.replace("style|", "enable_thinking|"))
    conversation = to_conversation({**PAIR, "chat_template_kwargs": json.dumps({"enable_thinking": value})}, "")
    encoded = Renderer(tokenizer, options=RenderOptions(enable_thinking=option)).encode(conversation)
    ids, other_ids = (own_ids(tokenizer, conversation, enable_thinking=switch) for switch in (value, not value))
    assert encoded.input_ids == ids != other_ids
    of_run = Renderer(tokenizer, options=RenderOptions(enable_thinking=value)).encode(to_conversation(PAIR, ""))
    assert encoded == of_run


def test_variables_of_the_run_are_overridden_by_those_of_a_record():
    tokenizer = tiny.build_tokenizer(STYLE_TEMPLATE.replace("'plain'", "other|default('plain')"))
    renderer = Renderer(tokenizer, options=RenderOptions(chat_template_kwargs={"style": "terse", "other": "x"}))
    for own, expected in (({}, "terse"), ({"style": "kind"}, "kind"), ({"other": "y"}, "terse")):
        conversation = to_conversation({**PAIR, "chat_template_kwargs": own}, "")
        ids = own_ids(tokenizer, conversation, **{"other": "x"} | own | {"style": expected})
        assert renderer.encode(conversation).input_ids == ids


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"effort": "low"},
            "data.chat_template_kwargs sets effort, but the chat template has no such variable; remove",
        ),
        ({"stile": False}, r"sets stile, but the chat template has no such variable \(did you mean style\?\); remove"),
        ({"enable_thinking": False}, "sets enable_thinking, but the chat template has no such variable"),
        ({"lookup": 0}, "sets lookup, but the chat template has no such variable"),
        ({"style": "<|im_end|>"}, "data.chat_template_kwargs spells a special token"),
    ],
)
def test_variables_of_the_run_that_cannot_be_used_are_errors(variables, expected):
    template = STYLE_TEMPLATE.replace("plain", "Use the lookup or effort") + "{# lookup #}{{ messages.lookup }}"
    with pytest.raises(ModelError, match=expected):
        Renderer(tiny.build_tokenizer(template), options=RenderOptions(chat_template_kwargs=variables))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"enable_thinking": True}, "has no variable enable_thinking (chat_template_kwargs)"),
        (
            {"stile": False},
            "has no variable stile (chat_template_kwargs) (did you mean style?); remove it",
        ),
        ({"style": "<|im_end|>"}, "gets a variable that spells a special token (chat_template_kwargs)"),
        ({"tools": [{"name": "f"}]}, "chat_template_kwargs.tools is not a variable that a record can set; write tools"),
        ({"add_generation_prompt": True}, "chat_template_kwargs.add_generation_prompt is not a variable"),
        (["style"], "chat_template_kwargs is a list; expected an object"),
        ({"style": "\ud83d"}, "chat_template_kwargs contains \\ud83d, half of a character"),
    ],
)
def test_variables_that_cannot_be_used_are_errors(variables, expected):
    with pytest.raises(DataError) as caught:
        renderer = Renderer(tiny.build_tokenizer(STYLE_TEMPLATE))
        renderer.encode(to_conversation({**PAIR, "chat_template_kwargs": variables}, "a.json, record 1"))
    assert str(caught.value).startswith("a.json, record 1: ") and expected in str(caught.value)


def test_special_token_in_a_variable_is_parsed_if_the_run_says_so():
    tokenizer = tiny.build_tokenizer(STYLE_TEMPLATE)
    conversation = to_conversation({**PAIR, "chat_template_kwargs": {"style": "<|im_end|>"}}, "")
    encoded = Renderer(tokenizer, options=RenderOptions(parse_special_tokens=True)).encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation, style="<|im_end|>")


@pytest.mark.parametrize("empty", [None, "", {}, "{}", {"tools": [], "add_generation_prompt": False, "style": None}])
def test_empty_variables_are_none(empty):
    assert to_conversation({**PAIR, "chat_template_kwargs": empty}, "") == to_conversation(PAIR, "")
