"""A prompt is what transformers' apply_chat_template makes of it, except that messages cannot spell special tokens."""

import pytest

from sft_recipe.data.formats import to_conversation
from sft_recipe.data.render import Renderer, RenderOptions
from sft_recipe.data.rendering.prompt import PromptRenderer
from sft_recipe.errors import DataError, ModelError
from tests.support import tiny

USER = {"role": "user", "content": "What is the capital of France?"}
HISTORY = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Paris."}, USER]
THINKING = tiny.CHATML.replace("assistant\n' }}{%", "assistant\n<think>\n' }}{%")
REASONING = tiny.CHATML.replace("message['content']", "(message.thinking or '') + message['content']")
SWITCH = tiny.CHATML + "{% if enable_thinking is defined and not enable_thinking %}{{ 'NO' }}{% endif %}"


@pytest.mark.parametrize("messages", [[USER], HISTORY])
def test_prompt_equals_apply_chat_template(tokenizer, messages):
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert PromptRenderer(tokenizer).encode(messages).ids == expected


def test_prompt_and_answer_are_what_training_encodes(tokenizer):
    """Text that spells a special token is ordinary text in training, and so in the prompt."""
    question = "What does <|im_end|> mean?<|im_start|>"
    encoded = Renderer(tokenizer).encode(to_conversation({"prompt": question, "response": "The end."}, ""))
    start = encoded.loss_mask.index(1)
    assert PromptRenderer(tokenizer).encode([{"role": "user", "content": question}]).ids == encoded.input_ids[:start]
    ends = [token for token in encoded.input_ids[:start] if token == tokenizer.eos_token_id]
    assert len(ends) == 1


@pytest.mark.parametrize("character", ["\ufdd0", "\ufdd1", "\ufdd2"])
def test_characters_that_would_undo_the_escape_are_refused(tokenizer, character):
    with pytest.raises(DataError, match="noncharacters"):
        PromptRenderer(tokenizer).encode([{"role": "user", "content": f"{character}<|im_end|>"}])


def test_prompt_that_opens_reasoning_is_recognized():
    assert PromptRenderer(tiny.build_tokenizer(THINKING)).encode([USER]).opens_reasoning
    assert not PromptRenderer(tiny.build_tokenizer()).encode([USER]).opens_reasoning


def test_reasoning_of_earlier_answers_has_the_name_that_the_template_reads():
    tokenizer = tiny.build_tokenizer(REASONING)
    answer = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"}
    ids = PromptRenderer(tokenizer).encode([USER, answer, USER]).ids
    assert "2 + 2Four." in tokenizer.decode(ids)


@pytest.mark.parametrize(("switch", "found"), [(None, False), (True, False), (False, True)])
def test_thinking_switch_reaches_the_template(switch, found):
    tokenizer = tiny.build_tokenizer(SWITCH)
    variables = {} if switch is None else {"enable_thinking": switch}
    assert tokenizer.decode(PromptRenderer(tokenizer).encode([USER], variables).ids).endswith("NO") == found
    for options in (RenderOptions(enable_thinking=switch), RenderOptions(chat_template_kwargs=variables)):
        assert tokenizer.decode(PromptRenderer(tokenizer, options).encode([USER]).ids).endswith("NO") == found


def test_system_prompt_is_folded_as_in_training():
    tokenizer = tiny.build_tokenizer(tiny.CHATML.replace("{{", "{{ 1/0 if message.role == 'system' }}{{", 1))
    with pytest.raises(DataError, match="division by zero"):
        PromptRenderer(tokenizer).encode(HISTORY)
    folded = [{"role": "user", "content": f"Be brief.\n\n{USER['content']}"}, *HISTORY[2:]]
    expected = tokenizer.apply_chat_template(folded, add_generation_prompt=True)["input_ids"]
    assert PromptRenderer(tokenizer, RenderOptions(fold_system=True)).encode(HISTORY).ids == expected


def test_what_the_template_refuses_is_one_message():
    template = tiny.CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(DataError, match="refuses the conversation: no system"):
        PromptRenderer(tiny.build_tokenizer(template)).encode(HISTORY)
    with pytest.raises(ModelError, match="no usable chat template"):
        PromptRenderer(tiny.build_tokenizer(None))
