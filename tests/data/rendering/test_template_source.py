"""What a template's source says in a comment, a string or its text is no tag, variable or field of it."""

import pytest

from sft_recipe.data.messages import Message
from sft_recipe.data.rendering.chat_template import ChatTemplate
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.errors import DataError, ModelError
from tests.data.rendering.random_conversations import chat
from tests.data.rendering.styles import own_ids, trained
from tests.support import tiny

CONVERSATION = chat(("user", "Hi"), ("assistant", "Paris."))
MENTIONS = [
    "{# {% generation %} #}",
    "{#- put {%- generation -%} and {% endgeneration %} around the answer -#}",
    "{% set hint = '{% generation %}' %}",
    "{% raw %}{% generation %}{% endraw %}",
    "{{ '{% generation %}' }}",
]


@pytest.mark.parametrize("mention", MENTIONS)
def test_a_generation_tag_that_is_only_mentioned_is_none(mention):
    tokenizer = tiny.build_tokenizer(mention + tiny.CHATML)
    encoded = Renderer(tokenizer).encode(CONVERSATION)
    assert encoded.input_ids == own_ids(tokenizer, CONVERSATION)
    assert trained(tokenizer, encoded) == ["Paris.<|im_end|>"]


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%+generation%}", "{%\n generation\n %}"])
def test_a_generation_tag_is_found_however_it_is_written(tag):
    template = "{% for m in messages %}{{ m.role }}" + tag + "{{ m.content }}{% endgeneration %}{% endfor %}"
    assert ChatTemplate(tiny.build_tokenizer(template)).has_generation_tags


@pytest.mark.parametrize("mention", ["{# set enable_thinking #}", "{{ 'enable_thinking' }}", "Now thinking starts."])
def test_a_thinking_switch_that_is_only_mentioned_is_none(mention):
    with pytest.raises(ModelError, match="the chat template has no such switch"):
        Renderer(tiny.build_tokenizer(mention + tiny.CHATML), options=RenderOptions(enable_thinking=True))


def test_a_variable_that_is_only_mentioned_is_none():
    tokenizer = tiny.build_tokenizer("{# style: any text #}The style is plain." + tiny.CHATML)
    with pytest.raises(ModelError, match="the chat template has no such variable"):
        Renderer(tokenizer, options=RenderOptions(chat_template_kwargs={"style": "terse"}))
    with pytest.raises(DataError, match="has no variable style"):
        Renderer(tokenizer).encode(
            type(CONVERSATION)(CONVERSATION.messages, "a.json, record 3", chat_template_kwargs={"style": "terse"})
        )


def test_the_field_of_reasoning_is_the_one_that_the_template_reads():
    """The comment names the field of another API; reasoning in that field would be left out."""
    template = "{# like message.reasoning_content #}" + tiny.CHATML.replace(
        "message['content']", "(message.thinking or '') + message['content']"
    )
    tokenizer = tiny.build_tokenizer(template)
    encoded = Renderer(tokenizer).encode(chat(("user", "Hi"), Message("assistant", "Paris.", "hm ")))
    assert trained(tokenizer, encoded) == ["hm Paris.<|im_end|>"]
