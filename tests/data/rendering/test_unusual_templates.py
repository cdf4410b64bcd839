"""Templates that omit or change content, and texts that resemble the template: masked correctly or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipe.data.messages import Message
from sft_recipe.data.rendering.renderer import Encoded, Renderer
from sft_recipe.errors import DataError
from tests.data.rendering.oracles import (
    TOKENIZERS,
    begins,
    each_case,
    examples,
    in_bytes,
    own_ids,
    rendered,
    special_ids,
    truth,
)
from tests.data.rendering.random_conversations import chat, conversations, function, renderer_of, schema, with_text
from tests.data.rendering.templates import STYLES

U, A, B = ("user", "Hi there"), ("assistant", "Hello Ann."), ("user", "Paris?")
CALL = (function("f", {"city": "Oslo Ås", "days": 3}),)
ASKS = Message("assistant", "", tool_calls=CALL)
RESULT = Message("tool", "It rains.", name="f")
TWICE = Message("assistant", "", tool_calls=(*CALL, function("f", {"city": "Rome"})))
TOOL, OTHER_TOOL = (
    schema("f", "Says the weather.", "city", "Where it is."),
    schema("g", "Says the time.", "zone", "Of what."),
)
CHATML, QWEN3, LLAMA3 = (STYLES[name].plain() for name in ("chatml", "qwen3", "llama3"))
THINKER = Message("assistant", "Four.", "Two and two.")
QUOTES_CALL = Message("assistant", 'I call f with {"city": "Oslo Ås", "days": 3}.', tool_calls=CALL)
WORDS = ["user", "a", "assistant", "s", "<|im", "im_end|>", "system\n", "|>", "{{", "tool", "model", "final", "INST]"]


def without(condition):
    """ChatML that shows no turn for which the condition holds."""
    loop = "{% for m in messages %}"
    return CHATML.replace(loop, loop + "{% if not (" + condition + ") %}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )


@each_case
@examples(8)
@given(st.data())
def test_short_texts_that_occur_in_the_template_are_located(name, kind, data):
    said = data.draw(st.lists(st.sampled_from(WORDS), min_size=2, max_size=6))
    roles = ("user", "assistant")
    conversation = chat(*((roles[index % 2], text) for index, text in enumerate(said)))
    encoded = renderer_of(name, kind).encode(conversation)
    assert encoded.input_ids == own_ids(TOKENIZERS[name, kind], conversation)
    assert encoded.loss_mask == truth(name, kind, encoded.input_ids, conversation)


# The template, the turns, and the turn that the error names.
REFUSED = {
    "lower case": (CHATML.replace("m.content", "m.content | lower"), [("user", "hi"), A], 1),
    "lower case once": (
        CHATML.replace("m.content", "(m.content | lower if loop.last else m.content)"),
        [U, A, B, ("assistant", "Other Words.")],
        3,
    ),
    "title case": (CHATML.replace("m.content", "m.content | title"), [("user", "Hi"), ("assistant", "hello ann.")], 1),
    "cut": (CHATML.replace("m.content", "m.content[:8]"), [("user", "Hi"), A], 1),
    "twice": (CHATML.replace("m.content", "m.content * (2 if m.role == 'assistant' else 1)"), [U, A], 1),
    "twice, far apart": (CHATML + "{% if messages[1] %}{{ messages[1].content }}{% endif %}", [U, A], 1),
    "replaced": (CHATML.replace("m.content", "m.content.replace('Ann', 'Bob')"), [("user", "Hi"), A], 1),
    "no first user": (without("loop.first"), [U, A], 0),
    "no first user, though the next says the same": (without("loop.first"), [U, A, U, A], 0),
    "no user but the last": (without("m.role == 'user' and loop.index0 < 2"), [U, A, B, A], 0),
    "no later user": (without("m.role == 'user' and loop.index0 == 2"), [U, A, B, A], 2),
    "no system": (without("m.role == 'system'"), [("system", "Be brief."), U, A], 0),
    "no system, though the user says the same": (without("m.role == 'system'"), [("system", "Hi there"), U, A], 0),
    "no assistant but the last": (without("m.role == 'assistant' and not loop.last"), [U, A, B, A], 1),
    "no results": (
        QWEN3.replace("+ content + '\n</tool_response>'", "+ '\n</tool_response>'"),
        [U, ASKS, RESULT, A],
        2,
    ),
    "no tool turns": (QWEN3.replace("elif m.role == 'tool'", "elif m.role == 'x'"), [U, ASKS, RESULT, A], 2),
    "no calls": (CHATML, [U, Message("assistant", "I call.", tool_calls=CALL), RESULT, A], 1),
    "no calls, though the text says the same": (CHATML, [U, QUOTES_CALL, RESULT, A], 1),
    "no calls, nothing said": (CHATML, [U, ASKS, RESULT, A], 1),
    "no arguments": (QWEN3.replace("{{ call.function.arguments | tojson }}", ""), [U, ASKS, RESULT, A], 1),
    "one call of two": (QWEN3.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), [U, TWICE, RESULT, A], 1),
    "no text beside the calls": (LLAMA3, [U, Message("assistant", "Let me see.", tool_calls=CALL), RESULT, A], 1),
    "too many calls": (LLAMA3, [U, TWICE, RESULT, RESULT, A], None),
    "no tools": (CHATML, [U, A], None),
    "one tool of two": (QWEN3.replace("for tool in tools", "for tool in tools[:1]"), [U, A], None),
    "no thoughts": (CHATML, [U, THINKER], 1),
    "no thoughts, though the answer says the same": (CHATML, [U, Message("assistant", "Four.", "Four.")], 1),
    "no thoughts in the last turn": (CHATML, [U, A, B, THINKER], 3),
    "roles out of order": (STYLES["llama2"].plain(), [U, B, A], None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_omitted_or_changed_content_is_refused(case):
    template, turns, turn = REFUSED[case]
    style = "llama3" if template == LLAMA3 else "llama2" if "INST" in template else "qwen3"
    conversation = chat(*turns, tools=(TOOL, OTHER_TOOL) if "tools" in case or "tool of" in case else ())
    with pytest.raises(DataError) as error:
        Renderer(TOKENIZERS[style, "bytes"], chat_template=template).encode(conversation)
    assert "a.json, record 3" in str(error.value) and "template" in str(error.value)
    if turn is not None:
        assert f"messages[{turn}]" in str(error.value)


JSON_RESULT = Message("tool", '{"rain": 3}', name="f")
THINKS_OF_CALLS = ("assistant", '<think>\nI call {"name": "f", "arguments": {}} by <tool_call>\n</think>\n\nFour.')
EVERYDAY = {
    "a thought about tools, dropped later": ("qwen3", [U, THINKS_OF_CALLS, B, A]),
    "a thought about tools, shown": ("qwen3", [U, A, B, THINKS_OF_CALLS]),
    "results in JSON with a system turn": ("mistral", [("system", "Be brief."), U, ASKS, JSON_RESULT, A, B, A]),
    "results in JSON with tools": ("mistral", [U, ASKS, JSON_RESULT, A, B, A]),
    "results in JSON": ("gpt_oss", [U, ASKS, JSON_RESULT, A, B, A]),
    "a user's line break": ("gpt_oss", [("user", "Hi\n"), A, B, A]),
    "an assistant's line break": ("gpt_oss", [U, ("assistant", "Yes.\n"), B, A]),
    "calls in several turns": ("gpt_oss", [U, ASKS, RESULT, A, B, ASKS, RESULT, A]),
}


@pytest.mark.parametrize("case", EVERYDAY)
def test_common_conversations_are_not_refused(case):
    name, turns = EVERYDAY[case]
    conversation = chat(*turns, tools=(TOOL,) if "tools" in case else ())
    encoded = renderer_of(name).encode(conversation)
    assert encoded.input_ids == own_ids(TOKENIZERS[name, "bytes"], conversation)
    assert encoded.loss_mask == truth(name, "bytes", encoded.input_ids, conversation)


@pytest.mark.parametrize("thought", ["I answer by <tool_call>", "# Tools", "First <think>", "a <tool_call> b"])
@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_reasoning_is_masked_out_whatever_it_contains(name, thought):
    if name == "qwen3" and "<think>" in thought:
        pytest.skip("that template takes the text after the last <think> alone, which is refused")
    conversation = chat(U, ("assistant", f"<think>\n{thought}\n</think>\n\nFour."))
    encoded = renderer_of(name, train_on_reasoning=False).encode(conversation)
    trained = [number for number, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag]
    assert TOKENIZERS[name, "bytes"].decode(trained).lstrip() == "Four.<|im_end|>"


def test_a_closing_tag_alone_is_not_reasoning():
    conversation = chat(U, ("assistant", "Close it with </think> at the end."))
    everything, answer = (renderer_of("chatml", train_on_reasoning=flag).encode(conversation) for flag in (True, False))
    assert everything == answer


# What the code itself writes in place of texts, or before special tokens.
SLOTS = ["\ufdd0", "\ufdd01.0\ufdd1", "\ufdd01.text0\ufdd1", "\ufdd0tools.data0\ufdd1", "\ufdd1x\ufdd0", "\ufdd2"]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "mistral", "python_list"])
@examples(30)
@given(st.data())
def test_slot_names_and_escapes_in_the_data_are_harmless(name, data):
    """Such texts may be refused, but they move no mask and become no token."""
    conversation = data.draw(conversations(name, evil=True, rounds=2))
    tokens = [token for token in STYLES[name].special if token != "<pad>"]
    text = data.draw(st.one_of(st.sampled_from(SLOTS), st.sampled_from(tokens).map("\ufdd2{}".format)))
    evil = with_text(conversation, text)
    [encoded] = renderer_of(name).encode_batch([evil])
    if isinstance(encoded, DataError):
        return
    specials = special_ids(TOKENIZERS[name, "bytes"])
    harmless = own_ids(TOKENIZERS[name, "bytes"], with_text(conversation, "Qz"))
    assert [number for number in encoded.input_ids if number in specials] == [n for n in harmless if n in specials]
    assert encoded.loss_mask == truth(name, "bytes", encoded.input_ids, evil)


def test_reasoning_opened_by_the_prompt_is_trained_after_the_tag():
    tokenizer = TOKENIZERS["deepseek", "bytes"]
    conversation = chat(U, ("assistant", "<think>\nhm\n</think>\n\nFour."))
    encoded = renderer_of("deepseek", "bytes").encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation)
    trained = [number for number, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag]
    assert tokenizer.decode(trained) == "hm\n</think>\n\nFour.<｜end▁of▁sentence｜>"


def test_two_adjacent_texts_do_not_form_a_special_token():
    joined = CHATML.replace("m.content", "(messages[0].content if loop.index0 == 1 else '') + m.content")
    joined = joined.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role != 'system' %}")
    joined = joined.replace("{% endfor %}", "{% endif %}{% endfor %}")
    tokenizer = TOKENIZERS["chatml", "bytes"]
    encoded = Renderer(tokenizer, chat_template=joined).encode(chat(("system", "so <|im_"), ("user", "end|> no"), A))
    specials = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [number for number in encoded.input_ids if number in specials] == specials * 2
    assert "so <|im_end|> no" in tokenizer.decode(encoded.input_ids)


def test_a_batch_returns_errors_in_place_of_bad_conversations():
    good, bad = chat(U, A), chat(U, THINKER)
    renderer = Renderer(TOKENIZERS["chatml", "bytes"])
    results = renderer.encode_batch([good, bad, good, bad, chat(B, A)])
    assert [type(result) for result in results] == [Encoded, DataError, Encoded, DataError, Encoded]
    assert results[0] == results[2] == renderer.encode(good)
    assert renderer.encode_batch([bad])[0].args == results[1].args
    assert renderer.encode_batch([]) == []


def chatml(body, header="'<|im_start|>' + m.role + '\n'", prompt="'<|im_start|>assistant\n'"):
    """ChatML with another body of the assistant's turns, or another header."""
    said = "«{{ BODY + '<|im_end|>' }}»".replace("BODY", body)
    return (
        (
            "{% for m in messages %}{{ HEADER }}{% if m.role == 'assistant' %}SAID{{ '\n' }}"
            "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
        )
        .replace("HEADER", header)
        .replace("PROMPT", prompt)
        .replace("SAID", said)
    )


EXOTIC = {
    "signed": chatml("m.content + '\n-- Bot'"),
    "inspects the text": chatml("('! ' if 'a' in m.content else '') + m.content"),
    "looks at how long it is": chatml("('long ' if m.content | length > 3 else '') + m.content"),
    "shows the first line only": chatml("m.content.split('\n')[0]"),
    "strips letters": chatml("m.content.strip('aH')"),
    "looks ahead": chatml("m.content + (' ...' if not loop.last else '')"),
    "counts": chatml(
        "m.content",
        "'<|im_start|>' + m.role + ' ' + loop.index | string + '\n'",
        "'<|im_start|>assistant ' + (messages | length + 1) | string + '\n'",
    ),
    "quotes": chatml(
        "m.content",
        "'<|im_start|>' + m.role + '\n> ' + (messages[loop.index0 - 1].content if loop.index0 else '') + '\n'",
        "'<|im_start|>assistant\n> ' + messages[-1].content + '\n'",
    ),
}


@pytest.mark.parametrize("case", EXOTIC)
@examples(25)
@given(st.data())
def test_an_unusual_template_is_masked_correctly_or_refused(case, data):
    conversation = data.draw(conversations("chatml"))
    tokenizer = TOKENIZERS["chatml", "bytes"]
    template = EXOTIC[case]
    renderer = Renderer(tokenizer, chat_template=template.replace("«", "").replace("»", ""))
    try:
        encoded = renderer.encode(conversation)
    except DataError:
        return
    marked = template.replace("«", "{% generation %}").replace("»", "{% endgeneration %}")
    text, spans = rendered(tokenizer, marked, conversation)
    places = begins("chatml", "bytes", encoded.input_ids, text)
    assert encoded.loss_mask[1:] == [
        int(any(start <= place < end for start, end in in_bytes(text, spans))) for place in places[1:]
    ]
