"""Templates, tokenizers and conversations that are refused, and the template of base models."""

import pytest
from tokenizers import AddedToken, processors

from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.rendering.text_tokens import OffsetTokens
from sft_recipe.errors import DataError, ModelError
from sft_recipe.models.tokenizer import ensure_chat_template
from tests.data.rendering.simple_templates import GEMMA_STRICT, LLAMA2
from tests.data.rendering.styles import CHAT, IM, PHI, RENDERERS, STYLES, chat, own_ids, trained
from tests.support import tiny

TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
TURN += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NO_GUESSING = {
    "refuses the conversation: Conversation roles must alternate": LLAMA2.replace("== 0)", "== 1)"),
    "refuses the conversation: System role not supported": GEMMA_STRICT,
    "changes the text of messages[0]": TURN.replace("BODY", "{{ m.content | upper }}"),
    "omits messages[2].content (assistant)": TURN.replace(
        "BODY", "{{ m.content if loop.last or m.role != 'assistant' }}"
    ),
    "omits messages[0].content (system)": TURN.replace("BODY", "{{ m.content if m.role != 'system' }}"),
    "messages[2] (assistant) more than once": TURN.replace("BODY", "{{ m.content + m.content }}"),
    "has the generation prompt": TURN.replace("BODY", "{{ m.content }}").replace("start|>assistant", "start|>bot"),
    "messages[2] (assistant) with '<|im_end|>' only when it is the last turn": (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
    "after its generation prompt": (
        "{% for m in messages | reverse %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    ),
    "no text between them": "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("problem", NO_GUESSING)
def test_templates_without_certain_turns_are_refused(tokenizer, problem):
    template = NO_GUESSING[problem].replace("«", "").replace("»", "")
    with pytest.raises(DataError) as error:
        Renderer(tokenizer, chat_template=template).encode(CHAT)
    assert str(error.value).startswith("a.json, record 3: the chat template of ")
    assert problem in str(error.value)


def test_the_error_names_the_source_of_the_bad_conversation():
    bad = chat(("user", "a"), ("user", "b"), ("assistant", "c"), source="b.json, record 7")
    good, error, also_good = RENDERERS["llama2"].encode_batch([CHAT, bad, CHAT])
    assert isinstance(error, DataError) and error.kind == "template"
    assert str(error).startswith("b.json, record 7: ") and "Conversation roles must alternate" in str(error)
    assert good == also_good == RENDERERS["llama2"].encode(CHAT)


def test_eos_at_the_very_end_is_enough_for_one_turn(tokenizer):
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    template += "{{ 'assistant:' if add_generation_prompt else eos_token }}"
    encoded = Renderer(tokenizer, chat_template=template).encode(chat(("user", "Hi"), ("assistant", "Yes")))
    assert trained(tokenizer, encoded) == ["Yes\n<|im_end|>"]


class Misplaced:
    """What a tokenizer says, with every token's place given to the one before it."""

    def __init__(self, encoding):
        self.encoding, self.ids = encoding, encoding.ids

    def __len__(self):
        return len(self.ids)

    def token_to_chars(self, token):
        return self.encoding.token_to_chars(min(token + 1, len(self) - 1))

    def char_to_token(self, char):
        token = self.encoding.char_to_token(char)
        return token and token - 1


def test_tokens_that_decode_to_other_text_are_refused():
    eos_twice = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token + eos_token }}{% endfor %}"
    eos_twice += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    renderer = Renderer(tiny.build_tokenizer(eos_twice))
    encode = renderer.core.encode
    renderer.tokenize = lambda texts: [OffsetTokens(text, renderer.core, Misplaced(encode(text))) for text in texts]
    with pytest.raises(DataError, match="but the tokens decode to"):
        renderer.encode(CHAT)


def test_a_turn_end_that_is_not_one_token_is_refused():
    tokenizer = tiny.build_tokenizer(STYLES["phi3"].plain(), PHI[:1], "<|endoftext|>")
    tokenizer.add_tokens([AddedToken("<|end|>", single_word=True, special=True)])
    with pytest.raises(DataError, match="which is not encoded as one special token"):
        Renderer(tokenizer).encode(chat(("user", "Hi"), ("assistant", "Hello")))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "never learn to stop"),
        ("{% for m in messages %}", "no usable chat template"),
        (None, "no usable chat template"),
    ],
)
def test_unusable_templates_are_refused(template, problem):
    with pytest.raises(ModelError, match=problem):
        Renderer(tiny.build_tokenizer(template)).encode(CHAT)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast, name_or_path = False, ""

    with pytest.raises(ModelError, match="the slow tokenizer Slow"):
        Renderer(Slow())


@pytest.mark.parametrize(
    ("special", "eos", "bos", "expected"),
    [
        (IM, "<|endoftext|>", None, "<|im_end|>"),
        (["<pad>", "</s>"], "</s>", None, "</s>"),
        (["<pad>", "<s>", "</s>"], "</s>", "<s>", "</s>"),
    ],
)
def test_a_base_model_gets_chatml_with_an_existing_end_token(special, eos, bos, expected):
    tokenizer = tiny.build_tokenizer(None, special, eos, **({"bos_token": bos} if bos else {}))
    if bos:
        number = tokenizer.bos_token_id
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
        tokenizer.backend_tokenizer.post_processor = template
    assert ensure_chat_template(tokenizer) is True
    assert ensure_chat_template(tokenizer) is False
    encoded = Renderer(tokenizer).encode(CHAT)
    assert encoded.input_ids == own_ids(tokenizer, CHAT)
    assert trained(tokenizer, encoded) == ["Hello." + expected, "Paris." + expected]
    start = f"{bos or ''}<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    start += f"<|im_start|>assistant\nHello.{expected}\n"
    assert tokenizer.decode(encoded.input_ids).startswith(start)


def test_a_base_model_without_an_end_token_is_refused():
    tokenizer = tiny.build_tokenizer(None, ["<pad>"], None)
    with pytest.raises(ModelError, match="no chat template and no eos token"):
        ensure_chat_template(tokenizer)
