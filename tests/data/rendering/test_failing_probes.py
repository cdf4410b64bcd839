"""Templates that render a conversation, but not what the renderer tries out to locate its turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipe.data.messages import Message
from sft_recipe.errors import DataError
from tests.data.rendering.oracles import TOKENIZERS, each_case, examples, own_ids, rendered, truth
from tests.data.rendering.random_conversations import answers, chat, function, renderer_of, schema, texts
from tests.data.rendering.styles import supervised_texts
from tests.data.rendering.templates import CHATML, MARKS, STYLES

SYSTEM, GREETING = ("system", "Be brief."), ("assistant", "Welcome.")
ASKED, ANSWER = ("user", "Capital of France?"), ("assistant", "Paris.")
TOOL = schema("f", "Says the weather.", "city", "Where it is.")
CALL = Message("assistant", "", tool_calls=(function("f", {"city": "Oslo"}),))
CHATML = CHATML.translate(MARKS)
REFUSES_EMPTY = "{% if messages[0].role == 'system' %}{% endif %}" + CHATML
NEEDS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}" + CHATML
)
PROMPT_IN_LOOP = (
    CHATML.replace("{% endfor %}", "").replace(
        "if add_generation_prompt %}", "if loop.last and add_generation_prompt %}"
    )
    + "{% endfor %}"
)
EOS_LAST = CHATML.replace(
    "{{ m.content + '<|im_end|>' }}", "{{ m.content + ('<|endoftext|>' if loop.last else '<|im_end|>') }}"
)
DROPS_SYSTEM_ALONE = CHATML.replace(
    "{% if m.role == 'assistant' %}",
    "{% if messages | length == 1 and m.role == 'system' %}{% elif m.role == 'assistant' %}",
)
NAMES_TOOLS = "{% for tool in tools %}{{ tool.function.name + '\n' }}{% endfor %}" + CHATML
NO_EMPTY_ARGUMENTS = CHATML.replace(
    "{{ m.content + '<|im_end|>' }}",
    "{{ m.content }}{% for call in m.tool_calls or [] %}{% if call.function.arguments in ({}, '{}') %}"
    "{{ raise_exception('arguments') }}{% endif %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>' }}",
)
HELLO = ["Welcome.<|im_end|>", "Paris.<|im_end|>"]
LOCATED = {
    "needs a message": (REFUSES_EMPTY, [GREETING, ASKED, ANSWER], HELLO),
    "needs a message for one turn": (REFUSES_EMPTY, [GREETING], HELLO[:1]),
    "needs a user turn after system": (NEEDS_USER, [SYSTEM, GREETING, ASKED, ANSWER], HELLO),
    "has its prompt in the loop": (PROMPT_IN_LOOP, [GREETING, ASKED, ANSWER], HELLO),
    "ends the last turn otherwise": (EOS_LAST, [ASKED, GREETING, ANSWER], [HELLO[0], "Paris.<|endoftext|>"]),
    "drops a system turn alone": (DROPS_SYSTEM_ALONE, [SYSTEM, GREETING, ASKED, ANSWER], HELLO),
}


@pytest.mark.parametrize("case", LOCATED)
def test_turns_are_located_where_the_turns_before_cannot_be_rendered(case):
    template, turns, expected = LOCATED[case]
    assert supervised_texts(template, *turns) == expected


@each_case
@examples(10)
@given(st.data())
def test_a_greeting_has_the_mask_of_the_marks(name, kind, data):
    answer, said = answers(name), texts(name)
    turns = [("assistant", data.draw(answer)), ("user", data.draw(said)), ("assistant", data.draw(answer))]
    conversation = chat(*([("system", data.draw(said))] if data.draw(st.booleans()) else []), *turns)
    try:
        text, _ = rendered(TOKENIZERS[name, kind], STYLES[name].marked(), conversation)
    except Exception:
        return  # the template refuses it
    try:
        encoded = renderer_of(name, kind).encode(conversation)
    except DataError as error:  # the system turn is put into the greeting, or the greeting has another header
        assert "generation prompt" in str(error) and text
        return
    assert encoded.input_ids == own_ids(TOKENIZERS[name, kind], conversation)
    assert encoded.loss_mask == truth(name, kind, encoded.input_ids, conversation)


def test_a_system_turn_inside_the_greeting_is_not_trained():
    template = (
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{{ messages[0].content + '\n\n' if loop.first and rest != messages }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert supervised_texts(template, SYSTEM, ASKED, ANSWER) == HELLO[1:]
    assert supervised_texts(template, SYSTEM, GREETING, ASKED, ANSWER) == HELLO


def test_a_greeting_with_another_header_is_refused():
    template = CHATML.replace("'<|im_start|>' + m.role", "('Bot: ' if loop.first else '<|im_start|>' + m.role)")
    assert supervised_texts(template, ASKED, ANSWER) == HELLO[1:]
    with pytest.raises(DataError, match=r"has no generation prompt for messages\[0\]"):
        supervised_texts(template, GREETING, ASKED, ANSWER)


def test_a_template_for_conversations_with_tools_may_need_tools():
    assert supervised_texts(NAMES_TOOLS, ASKED, ANSWER, tools=(TOOL,)) == HELLO[1:]


def test_a_template_may_need_the_arguments_of_calls():
    expected = '{"name": "f", "arguments": {"city": "Oslo"}}<|im_end|>'
    assert supervised_texts(NO_EMPTY_ARGUMENTS, ASKED, CALL) == [expected]


@pytest.mark.parametrize("empty", ["<|channel>thought\n<channel|>", "<|START_THINKING|><|END_THINKING|>"])
def test_the_prompt_may_close_reasoning_that_the_rendering_leaves_out(empty):
    template = CHATML.replace("'<|im_start|>assistant\n' }}", f"'<|im_start|>assistant\n{empty}' }}}}")
    template = template.replace("{{ m.content + '<|im_end|>' }}", "{{ '<|say|>' + m.content + '<|im_end|>' }}")
    assert supervised_texts(template, ASKED, ANSWER) == ["<|say|>" + HELLO[1]]


def test_the_prompt_may_close_reasoning_that_the_turn_has():
    template = CHATML.replace(
        "'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<|channel>thought\n<channel|>' }}"
    )
    reasoning = "{{ '<|channel>thought\n' + m.reasoning_content + '<channel|>' if m.reasoning_content }}"
    template = template.replace("{{ m.content + '<|im_end|>' }}", reasoning + "{{ m.content + '<|im_end|>' }}")
    assert supervised_texts(template, ASKED, Message("assistant", "Paris.", "hm")) == ["hm<channel|>" + HELLO[1]]


NO_HEADER_TWICE = CHATML.replace(
    "{{ '<|im_start|>' + m.role", "{{ '' if loop.previtem and loop.previtem.role == m.role else '<|im_start|>' + m.role"
)


def test_a_message_that_continues_the_turn_may_have_no_header():
    template = NO_HEADER_TWICE
    assert supervised_texts(template, ASKED, GREETING, ANSWER) == ["Welcome.<|im_end|>", "Paris.<|im_end|>"]


NO_HEADERS = (
    "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}{{ 'Answer: ' if add_generation_prompt }}"
)


@pytest.mark.parametrize("turns", [[ASKED, ANSWER], [ASKED, ANSWER, ASKED, ANSWER], [ASKED, GREETING, ANSWER]])
@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (
            CHATML.replace("assistant\n' }}{% endif", "assistant\nThink hard. ' }}{% endif"),
            r"assistant\\nThink hard\. ",
        ),
        (NO_HEADERS, "Answer: "),
        (NO_HEADERS.replace("'<|im_end|>'", "('\n' if m.role == 'user' else '<|im_end|>')"), "Answer: "),
    ],
)
def test_a_prompt_with_text_that_turns_do_not_contain_is_refused(template, prompt, turns):
    """At inference the model would answer after a text that it has never seen before an answer."""
    with pytest.raises(DataError, match=f"has the generation prompt .*{prompt}.*, but begins the assistant's turn"):
        supervised_texts(template, *turns)


def test_a_prompt_with_another_header_and_reasoning_is_refused():
    template = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|bot|><think>\n' }}")
    with pytest.raises(DataError, match="has the generation prompt"):
        supervised_texts(template, ASKED, ANSWER)
