"""System turns: later ones where the template shows them, and data.fold_system for templates without system turns."""

import pytest

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.errors import DataError
from tests.data.rendering.oracles import own_ids
from tests.data.rendering.templates import TURNS
from tests.support import tiny

GEMMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SILENT = tiny.CHATML.replace("message['content']", "(message['content'] if message.role != 'system' else '')")
PAIR = [("user", "Hi"), ("assistant", "Hello.")]


def talk(*turns):
    return Conversation(tuple(Message(role, text) for role, text in turns), "a.json, record 1")


def gemma2():
    return tiny.build_tokenizer(GEMMA2, TURNS, "<end_of_turn>", bos_token="<bos>")


def folding(tokenizer):
    return Renderer(tokenizer, options=RenderOptions(fold_system=True))


def supervised(tokenizer, encoded):
    return tokenizer.decode([token for token, bit in zip(encoded.input_ids, encoded.loss_mask, strict=True) if bit])


@pytest.mark.parametrize(
    ("turns", "folded"),
    [
        ([("system", "Be kind."), *PAIR], [("user", "Be kind.\n\nHi"), PAIR[1]]),
        ([("system", " Be kind.\n"), *PAIR], [("user", " Be kind.\n\n\nHi"), PAIR[1]]),
        ([("system", " "), *PAIR], PAIR),
        ([*PAIR, ("system", "Now rhyme."), *PAIR], [*PAIR, ("user", "Now rhyme.\n\nHi"), PAIR[1]]),
        ([("system", "Say <bos>"), *PAIR, *PAIR], [("user", "Say <bos>\n\nHi"), PAIR[1], *PAIR]),
        (PAIR, PAIR),
    ],
)
def test_folded_system_turns_equal_those_written_by_hand(turns, folded):
    tokenizer = gemma2()
    encoded = folding(tokenizer).encode(talk(*turns))
    assert encoded == Renderer(tokenizer).encode(talk(*folded))
    if not encoded.has_special_text:
        assert encoded.input_ids == own_ids(tokenizer, talk(*folded))
    answers = [text for role, text in turns if role == "assistant"]
    assert supervised(tokenizer, encoded) == "".join(f"{answer}<end_of_turn>" for answer in answers)


@pytest.mark.parametrize(
    "turns",
    [
        [*PAIR, ("system", "Now rhyme."), *PAIR],
        [("user", "Hi"), ("system", "Be kind."), ("assistant", "Hello.")],
        [("system", "Be kind."), *PAIR, ("system", "Now rhyme."), ("assistant", "Moon, soon.")],
    ],
)
def test_later_system_turns_are_context(turns):
    tokenizer = tiny.build_tokenizer()
    encoded = Renderer(tokenizer).encode(talk(*turns))
    assert encoded.input_ids == own_ids(tokenizer, talk(*turns))
    answers = [text for role, text in turns if role == "assistant"]
    assert supervised(tokenizer, encoded) == "".join(f"{answer}<|im_end|>" for answer in answers)


@pytest.mark.parametrize("turns", [[("system", "Be kind."), *PAIR], [*PAIR, ("system", "Rhyme."), *PAIR]])
def test_a_system_turn_that_the_template_does_not_show_is_an_error_with_the_remedy(turns):
    with pytest.raises(DataError, match=r"record 1: .*System role not supported; data.fold_system=true puts system"):
        Renderer(gemma2()).encode(talk(*turns))
    with pytest.raises(DataError, match=r"omits messages\[\d\].content \(system\); set data.fold_system=true, remove"):
        Renderer(tiny.build_tokenizer(SILENT)).encode(talk(*turns))
    assert folding(gemma2()).encode(talk(*turns)) and folding(tiny.build_tokenizer(SILENT)).encode(talk(*turns))


def test_a_remedy_that_would_not_help_is_not_named():
    with pytest.raises(DataError) as caught:
        Renderer(gemma2()).encode(talk(("system", "Be kind."), ("assistant", "Welcome."), *PAIR))
    assert "fold_system" not in str(caught.value)


def test_a_system_turn_without_a_user_turn_cannot_be_folded():
    with pytest.raises(DataError, match="record 1: .*fold_system needs a user turn after each system turn"):
        folding(gemma2()).encode(talk(("system", "Be kind."), ("assistant", "Welcome."), *PAIR))
