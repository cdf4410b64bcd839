"""Ids and masks, by hand-written expectations and against transformers' own {% generation %} masks."""

from dataclasses import dataclass, field
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.render import Renderer, ensure_chat_template
from sft_recipe.errors import DataError, ModelError
from tests import tiny

# Templates in the manner of well-known ones; « and » stand where {% generation %} marks would.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content + '<|im_end|>' }}»{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
# Shows thinking in the last turn only, and there always.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set text = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "«{% if loop.index0 > ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|im_end|>' }}»{{ '\n' }}"
    "{% else %}{{ text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' }}«{{ m.content.split('</think>')[-1] + eos_token }}»{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The prompt opens a thought that the rendering closes at once; the tags begin alike.
CLOSED_THOUGHT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}«{{ '</think>' + m.content + eos_token }}»{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set text = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}«{{ ' ' + text.strip() + ' ' + eos_token }}»{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content | trim }}{{ '<|eot_id|>' }}»"
    "{% else %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Moves the system turn into the last user turn.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == ns.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}«{{ ' ' + m.content | trim + eos_token }}»{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content | trim + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{% if role == 'model' %}«{{ m.content | trim }}{{ '<end_of_turn>' }}»"
    "{% else %}{{ m.content | trim }}{{ '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported.') }}{% endif %}" + GEMMA
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content + '<|end|>' }}»{{ '\n' }}"
    "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content + eos_token }}»{{ '\n' }}"
    "{% else %}{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}«{{ ' ' + m.content + '</s>' }}»{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Looks at what the system turn says.
SWITCH = (
    "{% set off = messages[0].role == 'system' and 'no thoughts' in messages[0].content %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if off %}{{ '(plain) ' }}{% endif %}«{{ m.content + '<|im_end|>' }}»{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if off %}{{ '(plain) ' }}{% endif %}{% endif %}"
)


@dataclass
class Style:
    """A template with marks, the special tokens it needs, and what `CHAT` trains."""

    template: str
    special: list[str]
    eos: str
    expected: list[str]
    bos: str | None = None
    swallow: list[str] = field(default_factory=list)  # special tokens that take the white space after them along
    legacy_spaces: bool = False

    def plain(self):
        return self.template.replace("«", "").replace("»", "")

    def marked(self):
        return self.template.replace("«", "{% generation %}").replace("»", "{% endgeneration %}")

    def tokenizer(self):
        build = spaced_tokenizer if self.legacy_spaces else tiny.build_tokenizer
        bos = {"bos_token": self.bos} if self.bos else {}
        tokenizer = build(self.plain(), self.special, self.eos, **bos)
        tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True) for token in self.swallow])
        return tokenizer


def spaced_tokenizer(chat_template, special_tokens, eos_token, **kwargs):
    """In the manner of the old Llama tokenizers: a space before each stretch of text, bytes for unknown characters."""
    characters = sorted({*map(chr, range(33, 127)), "\u2581", *"你好吗今天"})
    pieces = ["<unk>", *special_tokens, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens(list(special_tokens))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos_token, unk_token="<unk>", **kwargs)
    tokenizer.chat_template = chat_template
    return tokenizer


IM = tiny.SPECIAL
S = ["<unk>", "<s>", "</s>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = ["<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
LLAMA2_TRAINED = [" Hello. </s>", " Paris. </s>"]
STYLES = {
    "chatml": Style(CHATML, IM, "<|im_end|>", ["Hello.<|im_end|>", "Paris.<|im_end|>"]),
    "default_system": Style(DEFAULT_SYSTEM, IM, "<|im_end|>", ["Hello.<|im_end|>", "Paris.<|im_end|>"]),
    "thinking": Style(
        THINKING, IM, "<|im_end|>", ["Hello.<|im_end|>", "<think>\n\n</think>\n\nParis.<|im_end|>"]
    ),
    "deepseek": Style(
        DEEPSEEK, ["<s>", "</s>", "<|User|>", "<|Assistant|>"], "</s>", ["Hello.</s>", "Paris.</s>"], bos="<s>"
    ),
    "closed_thought": Style(CLOSED_THOUGHT, S, "</s>", ["</think>Hello.</s>", "</think>Paris.</s>"]),
    "llama2": Style(LLAMA2, S, "</s>", LLAMA2_TRAINED, bos="<s>"),
    "llama2_spaced": Style(
        LLAMA2, S[1:], "</s>", ["Hello. </s>", "Paris. </s>"], bos="<s>", legacy_spaces=True
    ),
    "llama3": Style(
        LLAMA3, HEADERS, "<|eot_id|>", ["Hello.<|eot_id|>", "Paris.<|eot_id|>"], bos="<|begin_of_text|>"
    ),
    "mistral": Style(MISTRAL, [*S, "[INST]", "[/INST]"], "</s>", [" Hello.</s>", " Paris.</s>"], bos="<s>"),
    "gemma": Style(GEMMA, TURNS, "<end_of_turn>", ["Hello.<end_of_turn>", "Paris.<end_of_turn>"], bos="<bos>"),
    "phi3": Style(PHI3, PHI, "<|endoftext|>", ["Hello.<|end|>", "Paris.<|end|>"]),
    "phi3_swallow": Style(
        PHI3, PHI[:1], "<|endoftext|>", ["Hello.<|end|>", "Paris.<|end|>"], swallow=PHI[1:]
    ),
    "zephyr": Style(ZEPHYR, S, "</s>", ["Hello.</s>", "Paris.</s>"]),
    "vicuna": Style(VICUNA, S, "</s>", [" Hello.</s>", " Paris.</s>"], bos="<s>"),
    "vicuna_spaced": Style(
        VICUNA, S[1:], "</s>", ["Hello.</s>", "Paris.</s>"], bos="<s>", legacy_spaces=True
    ),
    "switch": Style(SWITCH, IM, "<|im_end|>", ["Hello.<|im_end|>", "Paris.<|im_end|>"]),
}
BUILT = {name: style.tokenizer() for name, style in STYLES.items()}
RENDERERS = {name: Renderer(tokenizer) for name, tokenizer in BUILT.items()}
each_style = pytest.mark.parametrize("name", STYLES)


def chat(*turns, source="a.json, record 3"):
    return Conversation(tuple(Message(role, content) for role, content in turns), source)


CHAT = chat(
    ("system", "Be brief."),
    ("user", "Hi"),
    ("assistant", "Hello."),
    ("user", "Capital of France?"),
    ("assistant", "Paris."),
)


def trained(tokenizer, encoded):
    """The text of each unbroken run of supervised tokens."""
    runs, before = [], 0
    for token, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if flag:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def own_ids(tokenizer, conversation):
    return tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=True, return_dict=False)


def oracle(name, conversation):
    """transformers' mask of the marked template, less the tokens that straddle a start and the first one."""
    tokenizer, template = BUILT[name], STYLES[name].marked()
    out = tokenizer.apply_chat_template(
        conversation.as_dicts(),
        chat_template=template,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    [marks] = render_jinja_template(
        [conversation.as_dicts()],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )[1]
    mask = list(out["assistant_masks"])
    for index, (begin, end) in enumerate(out["offset_mapping"]):
        if index == 0 or any(begin < start < end for start, _ in marks):
            mask[index] = 0
    return mask


@each_style
def test_ids_and_trained_text(name):
    encoded = RENDERERS[name].encode(CHAT)
    assert encoded.input_ids == own_ids(BUILT[name], CHAT)
    assert trained(BUILT[name], encoded) == STYLES[name].expected
    assert encoded.loss_mask == oracle(name, CHAT)


ROLE_WORDS = ["assistant", "USER: ", "ASSISTANT:", "user\n", "[INST]", "[/INST]", "<<SYS>>", "system", "model\n"]
POOL = ["Hi", "Hello.", "你好", "a", " a ", "\n\nb\n", '"quoted"', "'", "{{ x }}", "🙂👍🏽", "é", "<b>x</b>", ".", "\u00a0x"]
SAID = [*POOL, *ROLE_WORDS, "You are a helpful assistant.", "no thoughts"]
pieces = st.one_of(st.sampled_from(SAID), st.text(max_size=12))
contents = st.lists(pieces, min_size=1, max_size=4).map("".join).filter(str.strip)
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
@settings(max_examples=60, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=3))
def test_any_conversation_has_the_oracles_mask(name, batch):
    for conversation, encoded in zip(batch, RENDERERS[name].encode_batch(batch), strict=True):
        assert encoded.input_ids == own_ids(BUILT[name], conversation)
        assert encoded.loss_mask == oracle(name, conversation)
        assert encoded.loss_mask[0] == 0
