"""Ids and masks, by hand-written expectations and against transformers' own {% generation %} masks."""

from dataclasses import dataclass, field
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.data.rendering.text_tokens import OffsetTokens
from sft_recipe.errors import DataError, ModelError
from sft_recipe.models.tokenizer import ensure_chat_template
from tests.support import tiny

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
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set text = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "«{% if loop.index0 > ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|im_end|>' }}»{{ '\n' }}"
    "{% else %}{{ text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' }}«{{ m.content.split('</think>')[-1] + eos_token }}»"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The prompt opens a thought that the rendering closes at once; the tags begin alike.
CLOSED_THOUGHT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}«{{ '</think>' + m.content + eos_token }}»"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
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
    "{{ bos_token }}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n' }}"
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
    "{% if loop.index0 == ns.last and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}"
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
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if off %}{{ '(plain) ' }}{% endif %}{% endif %}"
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
    """In the manner of the old Llama tokenizers: a space before each stretch of text, bytes for the rest."""
    characters = sorted({*map(chr, range(33, 127)), "\u2581", *"你好吗今天"})
    pieces = ["<unk>", *special_tokens, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
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
    "thinking": Style(THINKING, IM, "<|im_end|>", ["Hello.<|im_end|>", "<think>\n\n</think>\n\nParis.<|im_end|>"]),
    "deepseek": Style(
        DEEPSEEK,
        ["<s>", "</s>", "<|User|>", "<|Assistant|>"],
        "</s>",
        ["Hello.</s>", "Paris.</s>"],
        bos="<s>",
    ),
    "closed_thought": Style(CLOSED_THOUGHT, S, "</s>", ["</think>Hello.</s>", "</think>Paris.</s>"]),
    "llama2": Style(LLAMA2, S, "</s>", LLAMA2_TRAINED, bos="<s>"),
    "llama2_spaced": Style(LLAMA2, S[1:], "</s>", ["Hello. </s>", "Paris. </s>"], bos="<s>", legacy_spaces=True),
    "llama3": Style(LLAMA3, HEADERS, "<|eot_id|>", ["Hello.<|eot_id|>", "Paris.<|eot_id|>"], bos="<|begin_of_text|>"),
    "mistral": Style(MISTRAL, [*S, "[INST]", "[/INST]"], "</s>", [" Hello.</s>", " Paris.</s>"], bos="<s>"),
    "gemma": Style(GEMMA, TURNS, "<end_of_turn>", ["Hello.<end_of_turn>", "Paris.<end_of_turn>"], bos="<bos>"),
    "phi3": Style(PHI3, PHI, "<|endoftext|>", ["Hello.<|end|>", "Paris.<|end|>"]),
    "phi3_swallow": Style(PHI3, PHI[:1], "<|endoftext|>", ["Hello.<|end|>", "Paris.<|end|>"], swallow=PHI[1:]),
    "zephyr": Style(ZEPHYR, S, "</s>", ["Hello.</s>", "Paris.</s>"]),
    "vicuna": Style(VICUNA, S, "</s>", [" Hello.</s>", " Paris.</s>"], bos="<s>"),
    "vicuna_spaced": Style(VICUNA, S[1:], "</s>", ["Hello.</s>", "Paris.</s>"], bos="<s>", legacy_spaces=True),
    "switch": Style(SWITCH, IM, "<|im_end|>", ["Hello.<|im_end|>", "Paris.<|im_end|>"]),
}
BUILT = {name: style.tokenizer() for name, style in STYLES.items()}
# The oracle lets text become special tokens, so these do.
AS_IS = RenderOptions(parse_special_tokens=True)
RENDERERS = {name: Renderer(tokenizer, options=AS_IS) for name, tokenizer in BUILT.items()}
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
@settings(max_examples=60, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=3))
def test_any_conversation_has_the_oracles_mask(name, batch):
    for conversation, encoded in zip(batch, RENDERERS[name].encode_batch(batch), strict=True):
        assert encoded.input_ids == own_ids(BUILT[name], conversation)
        assert encoded.loss_mask == oracle(name, conversation)
        assert encoded.loss_mask[0] == 0


thoughts = st.builds("<think>\n{}\n</think>\n\n{}".format, contents, contents)
chats_with_thoughts = st.lists(st.tuples(contents, st.one_of(contents, thoughts)), min_size=1, max_size=3).map(
    lambda pairs: chat(*(turn for said, answer in pairs for turn in (("user", said), ("assistant", answer))))
)


@pytest.mark.parametrize("name", ["thinking", "deepseek", "chatml", "llama2"])
@settings(max_examples=60, deadline=None)
@given(chats_with_thoughts)
def test_any_thoughts_have_the_oracles_mask(name, conversation):
    encoded = RENDERERS[name].encode(conversation)
    assert encoded.input_ids == own_ids(BUILT[name], conversation)
    assert encoded.loss_mask == oracle(name, conversation)


def test_thoughts_are_trained_where_the_template_shows_them():
    thought = "<think>\nhm\n</think>\n\n"
    conversation = chat(("user", "Hi"), ("assistant", thought + "A"), ("user", "b"), ("assistant", thought + "B"))
    shown = {name: trained(BUILT[name], RENDERERS[name].encode(conversation)) for name in STYLES}
    assert shown["thinking"] == ["A<|im_end|>", thought + "B<|im_end|>"]
    assert shown["deepseek"] == ["\n\nA</s>", "\n\nB</s>"]
    assert shown["chatml"] == [thought + "A<|im_end|>", thought + "B<|im_end|>"]


def test_a_thought_that_the_prompt_opens_is_not_trained_again():
    template = STYLES["chatml"].plain().replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    tokenizer = tiny.build_tokenizer(template)
    encoded = Renderer(tokenizer).encode(chat(("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nA")))
    assert trained(tokenizer, encoded) == ["hm\n</think>\n\nA<|im_end|>"]


def test_a_template_with_generation_marks_is_taken_at_its_word():
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


def test_a_prompt_that_goes_on_is_shared_as_far_as_it_goes(tokenizer):
    template = STYLES["chatml"].plain().replace("assistant\n' }}{% endif", "assistant\n(calm)' }}{% endif")
    encoded = Renderer(tokenizer, chat_template=template).encode(CHAT)
    assert trained(tokenizer, encoded) == STYLES["chatml"].expected


def test_a_template_for_one_turn_only(tokenizer):
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
def test_turns_that_could_be_mistaken_for_others(name, turns):
    conversation = chat(*turns)
    encoded = RENDERERS[name].encode(conversation)
    assert encoded.input_ids == own_ids(BUILT[name], conversation)
    assert encoded.loss_mask == oracle(name, conversation)
    assert len(trained(BUILT[name], encoded)) == sum(role == "assistant" for role, _ in turns)


@pytest.mark.parametrize("turns", [[("assistant", "Hello.")], [("user", "a"), ("assistant", "b"), ("assistant", "c")]])
def test_turns_out_of_order(turns):
    conversation = chat(*turns)
    assert RENDERERS["chatml"].encode(conversation).loss_mask == oracle("chatml", conversation)


def test_a_token_across_the_start_is_not_trained(tokenizer):
    encoded = Renderer(tokenizer).encode(chat(("user", "Hi"), ("assistant", "    return")))
    tokens = [tokenizer.decode(token) for token in encoded.input_ids]
    assert tokens[-4:] == ["\n   ", " return", "<|im_end|>", "\n"]
    assert encoded.loss_mask[-4:] == [0, 1, 1, 0]


def test_a_character_across_the_start_is_trained_as_far_as_it_can_be(monkeypatch):
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


def test_a_normalising_tokenizer_is_no_obstacle():
    tokenizer = tiny.build_tokenizer(STYLES["chatml"].plain())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoded = Renderer(tokenizer).encode(chat(("user", "e\u0301"), ("assistant", "cafe\u0301 e\u0301.")))
    assert trained(tokenizer, encoded) == ["caf\u00e9 \u00e9.<|im_end|>"]


def test_plans_follow_the_date(monkeypatch):
    renderer, tokenizer = Renderer(BUILT["llama3"]), BUILT["llama3"]
    for year in (2031, 2032, 2033):
        today = type("Today", (datetime,), {"now": staticmethod(lambda year=year: datetime(year, 2, 3))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", today)
        encoded = renderer.encode(CHAT)
        assert f"03 Feb {year}" in tokenizer.decode(encoded.input_ids)
        assert trained(tokenizer, encoded) == STYLES["llama3"].expected


@pytest.mark.parametrize("change", ["| upper", "| tojson", "| length"])
def test_what_others_say_may_be_changed(change):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ 'U:' }}{{ m.content CHANGE }}{{ 'A:' }}"
    template += "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    tokenizer = tiny.build_tokenizer(template.replace("CHANGE", change))
    encoded = Renderer(tokenizer).encode(CHAT_WITHOUT_SYSTEM)
    assert trained(tokenizer, encoded) == ["Hello.<|im_end|>", "Paris.<|im_end|>"]


def test_batches_are_what_single_conversations_are():
    batch = [CHAT, CHAT_WITHOUT_SYSTEM, chat(("user", "你好"), ("assistant", " 🙂 "))]
    renderer = RENDERERS["chatml"]
    assert renderer.encode_batch(batch) == [renderer.encode(conversation) for conversation in batch]
    assert renderer.encode_batch([]) == []


CHAT_WITHOUT_SYSTEM = Conversation(CHAT.messages[1:], CHAT.source)
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
def test_what_is_uncertain_is_refused(tokenizer, problem):
    template = NO_GUESSING[problem].replace("«", "").replace("»", "")
    with pytest.raises(DataError) as error:
        Renderer(tokenizer, chat_template=template).encode(CHAT)
    assert str(error.value).startswith("a.json, record 3: the chat template of ")
    assert problem in str(error.value)


def test_the_conversation_at_fault_is_named():
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


def test_tokens_that_mean_something_else_are_refused():
    eos_twice = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token + eos_token }}{% endfor %}"
    eos_twice += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    renderer = Renderer(tiny.build_tokenizer(eos_twice))
    encode = renderer.core.encode
    renderer.tokenize = lambda texts: [OffsetTokens(text, renderer.core, Misplaced(encode(text))) for text in texts]
    with pytest.raises(DataError, match="but the tokens decode to"):
        renderer.encode(CHAT)


def test_an_end_that_is_no_token_there_is_refused():
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
def test_templates_that_cannot_be_trained(template, problem):
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
def test_a_base_model_gets_chatml_with_an_end_that_it_has(special, eos, bos, expected):
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


def test_a_base_model_without_any_end_is_refused():
    tokenizer = tiny.build_tokenizer(None, ["<pad>"], None)
    with pytest.raises(ModelError, match="no chat template and no eos token"):
        ensure_chat_template(tokenizer)
