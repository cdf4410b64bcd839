"""Ids and masks, by hand-written expectations and against transformers' own {% generation %} masks."""

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from sft_recipe.data.rendering.renderer import Renderer
from tests.data.rendering.styles import (
    BUILT,
    CHAT,
    CHAT_WITHOUT_SYSTEM,
    RENDERERS,
    STYLES,
    S,
    chat,
    each_style,
    oracle,
    own_ids,
    trained,
)
from tests.support import tiny


@each_style
def test_ids_and_supervised_text_match_the_expectation(name):
    encoded = RENDERERS[name].encode(CHAT)
    assert encoded.input_ids == own_ids(BUILT[name], CHAT)
    assert trained(BUILT[name], encoded) == STYLES[name].expected
    assert encoded.loss_mask == oracle(name, CHAT)


ROLE_WORDS = [
    "assistant",
    "USER: ",
    "ASSISTANT:",
    "user\n",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "system",
    "model\n",
]
POOL = [
    "Hi",
    "Hello.",
    "你好",
    "a",
    " a ",
    "\n\nb\n",
    '"quoted"',
    "'",
    "{{ x }}",
    "🙂👍🏽",
    "é",
    "<b>x</b>",
    ".",
    "\u00a0x",
]
SAID = [*POOL, *ROLE_WORDS, "You are a helpful assistant.", "no thoughts"]
pieces = st.one_of(st.sampled_from(SAID), st.text(max_size=12))
contents = st.lists(pieces, min_size=1, max_size=4).map("".join)
contents = contents.filter(lambda text: text.rpartition("</think>")[2].strip())
blank_too = st.one_of(contents, st.sampled_from(["", " \n"]))


@st.composite
def conversations(draw):
    turns = [("system", draw(blank_too))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(contents)), ("assistant", draw(contents))]
    if draw(st.booleans()):
        turns.append(("user", draw(contents)))
    return chat(*turns)


@each_style
@settings(max_examples=60)
@given(st.lists(conversations(), min_size=1, max_size=3))
def test_random_conversations_have_the_mask_of_the_oracle(name, batch):
    for conversation, encoded in zip(batch, RENDERERS[name].encode_batch(batch), strict=True):
        assert encoded.input_ids == own_ids(BUILT[name], conversation)
        assert encoded.loss_mask == oracle(name, conversation)
        assert encoded.loss_mask[0] == 0


# The template "thinking" takes what follows the last <think> as the thought, so that one inside it is refused.
plain_thoughts = contents.filter(lambda text: "<think>" not in text)
thoughts = st.builds("<think>\n{}\n</think>\n\n{}".format, plain_thoughts, contents)
chats_with_thoughts = st.lists(st.tuples(contents, st.one_of(contents, thoughts)), min_size=1, max_size=3).map(
    lambda pairs: chat(*(turn for said, answer in pairs for turn in (("user", said), ("assistant", answer))))
)


@pytest.mark.parametrize("name", ["thinking", "deepseek", "chatml", "llama2"])
@settings(max_examples=60)
@given(chats_with_thoughts)
def test_random_reasoning_has_the_mask_of_the_oracle(name, conversation):
    encoded = RENDERERS[name].encode(conversation)
    assert encoded.input_ids == own_ids(BUILT[name], conversation)
    assert encoded.loss_mask == oracle(name, conversation)


def test_reasoning_is_trained_where_the_template_renders_it():
    thought = "<think>\nhm\n</think>\n\n"
    conversation = chat(("user", "Hi"), ("assistant", thought + "A"), ("user", "b"), ("assistant", thought + "B"))
    shown = {name: trained(BUILT[name], RENDERERS[name].encode(conversation)) for name in STYLES}
    assert shown["thinking"] == ["A<|im_end|>", thought + "B<|im_end|>"]
    assert shown["deepseek"] == ["\n\nA</s>", "\n\nB</s>"]
    assert shown["chatml"] == [thought + "A<|im_end|>", thought + "B<|im_end|>"]


def test_a_tag_opened_by_the_prompt_is_not_trained():
    template = STYLES["chatml"].plain().replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    tokenizer = tiny.build_tokenizer(template)
    encoded = Renderer(tokenizer).encode(chat(("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nA")))
    assert trained(tokenizer, encoded) == ["hm\n</think>\n\nA<|im_end|>"]


def test_generation_tags_decide_what_is_trained():
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ 'A\n' }}"
    template += "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
    tokenizer = tiny.build_tokenizer(template)
    encoded = Renderer(tokenizer).encode(CHAT_WITHOUT_SYSTEM)
    assert encoded.input_ids == own_ids(tokenizer, CHAT_WITHOUT_SYSTEM)
    assert trained(tokenizer, encoded) == ["Hello.", "Paris."]


@pytest.mark.parametrize("template", ["{% generation %}BODY{% endgeneration %}", "BODY"])
def test_the_first_token_is_never_trained(tokenizer, template):
    body = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    encoded = Renderer(tokenizer, chat_template=template.replace("BODY", body)).encode(chat(("assistant", "你好")))
    assert encoded.loss_mask == [0] + [1] * (len(encoded.input_ids) - 1)


@pytest.mark.parametrize("more", ["\n", "<think>\n", "<think>\n\n</think>\n\n"])
def test_only_the_shared_part_of_the_generation_prompt_is_context(tokenizer, more):
    template = STYLES["chatml"].plain().replace("assistant\n' }}{% endif", f"assistant\n{more}' }}}}{{% endif")
    encoded = Renderer(tokenizer, chat_template=template).encode(CHAT)
    assert trained(tokenizer, encoded) == STYLES["chatml"].expected


def test_a_template_that_accepts_one_turn_only_works(tokenizer):
    template = "{% if messages[2:] %}{{ raise_exception('one turn only') }}{% endif %}" + STYLES["chatml"].plain()
    encoded = Renderer(tokenizer, chat_template=template).encode(chat(("user", "Hi"), ("assistant", "Yes")))
    assert trained(tokenizer, encoded) == ["Yes<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "vicuna", "thinking", "llama2_spaced"])
@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a"), ("assistant", "same"), ("user", "b"), ("assistant", "same")],
        [("user", "Say Paris. Paris."), ("assistant", "Paris."), ("user", "Paris."), ("assistant", "Paris.")],
        [("user", "assistant"), ("assistant", "a"), ("user", "assistant\na"), ("assistant", "assistant")],
        [("user", "a"), ("assistant", "b"), ("user", "unanswered")],
        [
            ("user", "\ufdd01.0\ufdd1"),
            ("assistant", "\ufdd00.0\ufdd1"),
            ("user", "\ufdd0"),
            ("assistant", "1.0"),
        ],
        [("system", "\ufdd01.0\ufdd1"), ("user", "\ufdd02.0\ufdd1 no thoughts"), ("assistant", "\ufdd1")],
        [
            ("system", "Be brief."),
            ("user", "USER:"),
            ("assistant", "ASSISTANT:"),
        ],  # a literal of the template
        [("user", "<|im_end|>\n<|im_start|>assistant\nno<|im_end|></s>"), ("assistant", "a</s>b<|im_end|>")],
    ],
)
def test_turns_with_similar_texts_are_not_confused(name, turns):
    conversation = chat(*turns)
    encoded = RENDERERS[name].encode(conversation)
    assert encoded.input_ids == own_ids(BUILT[name], conversation)
    assert encoded.loss_mask == oracle(name, conversation)
    assert len(trained(BUILT[name], encoded)) == sum(role == "assistant" for role, _ in turns)


@pytest.mark.parametrize("turns", [[("assistant", "Hello.")], [("user", "a"), ("assistant", "b"), ("assistant", "c")]])
def test_turns_in_unusual_order_are_masked(turns):
    conversation = chat(*turns)
    assert RENDERERS["chatml"].encode(conversation).loss_mask == oracle("chatml", conversation)


def test_a_token_across_the_start_is_not_trained(tokenizer):
    encoded = Renderer(tokenizer).encode(chat(("user", "Hi"), ("assistant", "    return")))
    tokens = [tokenizer.decode(token) for token in encoded.input_ids]
    assert tokens[-4:] == ["\n   ", " return", "<|im_end|>", "\n"]
    assert encoded.loss_mask[-4:] == [0, 1, 1, 0]


def test_later_byte_tokens_of_a_character_across_the_start_are_trained(monkeypatch):
    monkeypatch.setattr(tiny, "CORPUS", ["不 乐 亿 他 伙 你 使 侠"])  # the first byte of all is the same
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{{ 'assistant: ' if add_generation_prompt }}"
    tokenizer = tiny.build_tokenizer(template, S, "</s>", 260)
    conversation = chat(("user", "Hi"), ("assistant", "买"))
    encoded = Renderer(tokenizer).encode(conversation)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids)[-4:] == ["Ġä", "¹", "°", "</s>"]
    assert encoded.loss_mask[-4:] == [0, 1, 1, 1]


def test_unknown_characters_are_trained_as_the_unknown_token():
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "</s>", *"abAB:"])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    tokenizer.chat_template += "{{ 'a:' if add_generation_prompt }}"
    encoded = Renderer(tokenizer).encode(chat(("user", "ab"), ("assistant", "a好b")))
    assert encoded.input_ids[-4:] == [2, 0, 3, 1]
    assert encoded.loss_mask[-6:] == [0, 0, 1, 1, 1, 1]


def test_eos_ends_a_turn_even_if_it_is_not_flagged_special():
    core = tiny.build_tokenizer(None, ["<pad>"], "<pad>").backend_tokenizer
    core.add_tokens([AddedToken("</s>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = STYLES["zephyr"].plain()
    assert trained(tokenizer, Renderer(tokenizer).encode(CHAT)) == ["Hello.</s>", "Paris.</s>"]


def test_a_normalizing_tokenizer_is_supported():
    tokenizer = tiny.build_tokenizer(STYLES["chatml"].plain())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoded = Renderer(tokenizer).encode(chat(("user", "e\u0301"), ("assistant", "cafe\u0301 e\u0301.")))
    assert trained(tokenizer, encoded) == ["caf\u00e9 \u00e9.<|im_end|>"]


def test_mask_plans_are_renewed_when_the_date_in_the_template_changes(monkeypatch):
    renderer, tokenizer = Renderer(BUILT["llama3"]), BUILT["llama3"]
    for year in (2031, 2032, 2033):
        today = type("Today", (datetime,), {"now": staticmethod(lambda year=year: datetime(year, 2, 3))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", today)
        encoded = renderer.encode(CHAT)
        assert f"03 Feb {year}" in tokenizer.decode(encoded.input_ids)
        assert trained(tokenizer, encoded) == STYLES["llama3"].expected


@pytest.mark.parametrize("change", ["| upper", "| tojson", "| length"])
def test_a_template_may_change_user_texts(change):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ 'U:' }}{{ m.content CHANGE }}{{ 'A:' }}"
    template += "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    tokenizer = tiny.build_tokenizer(template.replace("CHANGE", change))
    encoded = Renderer(tokenizer).encode(CHAT_WITHOUT_SYSTEM)
    assert trained(tokenizer, encoded) == ["Hello.<|im_end|>", "Paris.<|im_end|>"]


def test_a_batch_gives_the_results_of_single_conversations():
    batch = [CHAT, CHAT_WITHOUT_SYSTEM, chat(("user", "你好"), ("assistant", " 🙂 "))]
    renderer = RENDERERS["chatml"]
    assert renderer.encode_batch(batch) == [renderer.encode(conversation) for conversation in batch]
    assert renderer.encode_batch([]) == []
