"""Reasoning in the content of a turn, and reasoning that a template leaves out."""

from dataclasses import replace

import pytest

from sft_recipe.data.messages import Message
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.errors import DataError
from tests.data.rendering.random_conversations import chat, function
from tests.data.rendering.styles import IM, own_ids, trained
from tests.data.rendering.templates import CHATML, MARKS, STYLES
from tests.support import tiny

USER = Message("user", "Two and two?")
OWN_BLOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ OPEN + (m.reasoning_content or '') + CLOSE }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + OPEN }}{% endif %}"
)
BLOCKS = {
    "think": ("'<think>'", "'</think>'"),
    "newlines": ("'<think>\n'", "'\n</think>\n\n'"),
    "named": ("'<mm:think>'", "'</mm:think>'"),
}
CALL = (function("f", {"city": "Oslo"}),)


def inline(content, reasoning, calls=()):
    return Message("assistant", f"<think>\n{reasoning}\n</think>\n\n{content}", tool_calls=calls)


def encode(template, conversation, **options):
    return Renderer(tiny.build_tokenizer(template), options=RenderOptions(**options)).encode(conversation)


@pytest.mark.parametrize("block", BLOCKS)
def test_inline_reasoning_goes_into_the_block_that_the_template_writes(block):
    opening, closing = BLOCKS[block]
    template = OWN_BLOCK.replace("OPEN", opening).replace("CLOSE", closing)
    turns = [("Four.", "2 + 2 = 4", ()), ("", "I ask.", CALL), ("Six.", "", ())]
    messages = [[USER, inline(*turn)] for turn in turns]
    fields = [[USER, Message("assistant", content, thought, calls)] for content, thought, calls in turns]
    conversation, expected = (chat(*sum(pairs, [])) for pairs in (messages, fields))
    encoded = encode(template, conversation)
    tokenizer = tiny.build_tokenizer(template)
    assert encoded.input_ids == own_ids(tokenizer, expected)
    assert trained(tokenizer, encoded) == [
        "".join((thought, closing.strip("'"), content, "".join(CALLED for _ in calls), "<|im_end|>"))
        for content, thought, calls in turns
    ]
    assert encoded == encode(template, expected)


CALLED = '{"name": "f", "arguments": {"city": "Oslo"}}'
READS_CONTENT = STYLES["qwen3"].plain()


@pytest.mark.parametrize("template", [CHATML.translate(MARKS), READS_CONTENT])
def test_inline_reasoning_stays_where_the_template_writes_no_block_before_it(template):
    conversation = chat(USER, inline("Four.", "2 + 2 = 4"))
    tokenizer = tiny.build_tokenizer(template)
    encoded = Renderer(tokenizer).encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation)
    assert trained(tokenizer, encoded) == ["<think>\n2 + 2 = 4\n</think>\n\nFour.<|im_end|>"]


@pytest.mark.parametrize("answer", [inline("Four.", "hm"), Message("assistant", "Four.", "hm")])
def test_reasoning_that_needs_the_thinking_switch_says_so(answer):
    problem = r"omits messages\[1\].reasoning \(assistant\); set data.enable_thinking=true, remove it"
    template = OWN_BLOCK.replace("(m.reasoning_content or '')", "(enable_thinking and m.reasoning_content or '')")
    template = template.replace("OPEN", "'<think>'").replace("CLOSE", "'</think>'")
    conversation = chat(USER, answer)
    with pytest.raises(DataError, match=problem):
        encode(template, conversation)
    encoded = encode(template, conversation, enable_thinking=True)
    assert trained(tiny.build_tokenizer(template), encoded) == ["hm</think>Four.<|im_end|>"]


def test_inline_reasoning_stays_in_a_template_without_a_field_for_it():
    template = CHATML.translate(MARKS).replace("{{ m.content +", "{{ '<think>\n\n</think>\n\n' + m.content +", 1)
    conversation = chat(USER, inline("Four.", "hm"))
    expected = "<think>\n\n</think>\n\n<think>\nhm\n</think>\n\nFour.<|im_end|>"
    assert trained(tiny.build_tokenizer(template), encode(template, conversation)) == [expected]


@pytest.mark.parametrize("in_content", [True, False])
def test_answers_whose_reasoning_the_template_leaves_out_are_counted(in_content):
    answers = [inline(text, "hm") if in_content else Message("assistant", text, "hm") for text in ("A.", "B.", "C.")]
    conversation = chat(*(turn for answer in answers for turn in (USER, answer)))
    tokenizer = tiny.build_tokenizer(READS_CONTENT, IM)
    encoded = encode(READS_CONTENT, conversation)
    assert trained(tokenizer, encoded) == ["A.<|im_end|>", "B.<|im_end|>", "<think>\nhm\n</think>\n\nC.<|im_end|>"]
    assert (encoded.earlier_without_reasoning, encoded.drops_reasoning) == (2, False)
    assert encode(READS_CONTENT, conversation, train_on="last").earlier_without_reasoning == 0
    first, answer, *rest = conversation.messages
    masked = chat(first, replace(answer, train=False), *rest)
    assert encode(READS_CONTENT, masked).earlier_without_reasoning == 1
    assert encode(CHATML.translate(MARKS), chat(USER, inline("A.", "hm"))).earlier_without_reasoning == 0


FIELD = "{{ 'Thought: ' + m.reasoning_content + 'END' if m.reasoning_content }}{{ m.content"


@pytest.mark.parametrize(
    ("after", "answer"),
    [(" ", " Paris"), ("", "Paris"), ("\n\n", "Paris"), (" \n", "Paris"), ("\n\n ", " Paris"), ("\r\n", "Paris")],
)
@pytest.mark.parametrize("end", [None, "</think>", " The answer:"])
def test_the_answer_after_masked_reasoning_begins_with_its_space(after, answer, end):
    """A byte-level vocabulary has " Paris" as one token: the model must produce the space as well."""
    template = CHATML.translate(MARKS)
    message = Message("assistant", f"<think>hm</think>{after}Paris")
    if end:
        template = template.replace("{{ m.content", FIELD.replace("END", end + after.replace("\n", "\\n")), 1)
        message = Message("assistant", "Paris", "hm")
    tokenizer = tiny.build_tokenizer(template)
    encoded = Renderer(tokenizer, options=RenderOptions(train_on_reasoning=False)).encode(chat(USER, message))
    assert trained(tokenizer, encoded) == [f"{answer}<|im_end|>"]
    assert encoded.joined_starts == 0
