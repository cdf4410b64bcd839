"""Where turns end: templates that always add a generation prompt, repeat names, or begin turns in several ways."""

import pytest

from sft_recipe.data.messages import Message
from sft_recipe.errors import DataError
from tests.data.rendering.random_conversations import function, schema
from tests.data.rendering.styles import IM, supervised_texts
from tests.data.rendering.templates import CHATML, MARKS

U, A, B, C = ("user", "Hi there."), ("assistant", "Hello."), ("user", "Paris?"), ("assistant", "In France.")
TOOLS = (schema("weather", "Says the weather.", "city", "Where it is."),)
CALL = Message("assistant", "", tool_calls=(function("weather", {"city": "Oslo"}),))
RESULT = Message("tool", "It rains.", name="weather")
CHATML = CHATML.translate(MARKS)
ALWAYS = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
COMMAND = (
    "{% for m in messages %}{{ '<|START|>' }}"
    "{% if m.role == 'assistant' %}{{ '<|CHATBOT|><|SAY|>' + m.content + '<|SAID|><|END|>' }}"
    "{% else %}{{ '<|USER|>' + m.content + '<|END|>' }}{% endif %}{% endfor %}{{ '<|START|><|CHATBOT|>' }}"
)
COMMAND_SPECIAL = ["<pad>", "<|START|>", "<|CHATBOT|>", "<|USER|>", "<|SAY|>", "<|SAID|>", "<|END|>"]


@pytest.mark.parametrize("turns", [(U, A), (U, A, B, C), (U, A, C), (A, B, C), (A,)])
@pytest.mark.parametrize("eos", ["<|END|>", "<pad>"])
def test_a_prompt_that_a_template_always_adds_is_not_trained(turns, eos):
    said = [content for role, content in turns if role == "assistant"]
    expected = [f"<|SAY|>{content}<|SAID|><|END|>" for content in said]
    assert supervised_texts(COMMAND, *turns, special=COMMAND_SPECIAL, eos=eos) == expected
    assert supervised_texts(ALWAYS, *turns, eos=eos.replace("<pad>", "<|endoftext|>").replace("<|END|>", IM[2])) == [
        content + "<|im_end|>" for content in said
    ]


def test_turns_may_contain_the_token_that_begins_them():
    said = "'<|open|>reply<|sep|>' + m.content + '<|close|>reply<|sep|><|end|>'"
    template = (
        "{% for m in messages %}{{ '<|open|>' + m.role + '<|sep|>' }}{% if m.role == 'assistant' %}{{ SAID }}"
        "{% for call in m.tool_calls or [] %}{{ '<|open|>' + call.function.name + '<|sep|>' }}"
        "{{ call.function.arguments | tojson }}{{ '<|close|>' + '<|end|>' }}{% endfor %}"
        "{% else %}{{ m.name or '' }}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|open|>assistant<|sep|>' }}{% endif %}"
    ).replace("SAID", said)
    special = ["<pad>", "<|open|>", "<|sep|>", "<|close|>", "<|end|>"]
    expected = "<|open|>reply<|sep|><|close|>reply<|sep|><|end|>"
    expected += '<|open|>weather<|sep|>{"city": "Oslo"}<|close|><|end|>'
    last = "<|open|>reply<|sep|>In France.<|close|>reply<|sep|><|end|>"
    found = supervised_texts(template, U, CALL, RESULT, C, special=special, eos="<pad>", tools=())
    assert found == [expected, last]


@pytest.mark.parametrize("turns", [(U, CALL), (U, CALL, RESULT), (U, CALL, RESULT, C)])
def test_the_name_of_a_tool_may_occur_twice_in_its_call_and_again_in_its_result(turns):
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        "{% for call in m.tool_calls or [] %}{{ ' to=' + call.function.name + '\n<invoke name=' + call.function.name }}"
        "{{ '>' }}{{ call.function.arguments | tojson }}{% endfor %}"
        "{{ (' ' + m.name if m.name else '') + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    call = ' to=weather\n<invoke name=weather>{"city": "Oslo"}\n<|im_end|>'
    answers = ["\nIn France.<|im_end|>"] if C in turns else []
    assert supervised_texts(template, *turns, tools=TOOLS) == [call, *answers]


def test_the_header_of_the_next_turn_does_not_end_a_turn():
    template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}{% endfor %}"
        "{{ '<|model|>' if add_generation_prompt else '<|end|>' }}"
    )
    special = ["<pad>", "<|user|>", "<|model|>", "<|end|>"]
    assert supervised_texts(template, U, A, special=special, eos="<|end|>") == ["Hello.<|end|>"]
    for turns in ((U, A, C), (U, A, B, C)):
        with pytest.raises(DataError, match="only when it is the last turn"):
            supervised_texts(template, *turns, special=special, eos="<|end|>")


def test_calls_may_end_otherwise_than_the_last_turn():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
        "{% endfor %}{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert supervised_texts(template, U, CALL, RESULT, C) == [
        'weather({"city": "Oslo"})<|im_end|>',
        "In France.<|endoftext|>",
    ]


def test_a_header_that_only_users_turns_ask_for_is_not_trained():
    template = CHATML.replace("{% if add_gen", "{% if messages[-1].role == 'user' and add_gen")
    assert supervised_texts(template, U, A, C) == ["Hello.<|im_end|>", "In France.<|im_end|>"]


@pytest.mark.parametrize("identifier", ["functions.weather:0", "weather", "call_weather_0", ""])
def test_a_template_may_show_the_id_of_a_call_in_place_of_its_name(identifier):
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.id }}{{ call.function.arguments | tojson }}{% endfor %}"
        "{{ (m.tool_call_id or '') + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = Message("assistant", "", tool_calls=(function("weather", {"city": "Oslo"}, identifier),))
    turns = U, call, Message("tool", "It rains.", tool_call_id=identifier), C
    if identifier in ("call_weather_0", ""):  # no word of the id is the name
        with pytest.raises(DataError, match=r"omits messages\[1\].tool_calls"):
            supervised_texts(template, *turns, tools=TOOLS)
    else:
        expected = [identifier + '{"city": "Oslo"}<|im_end|>', "In France.<|im_end|>"]
        assert supervised_texts(template, *turns, tools=TOOLS) == expected
