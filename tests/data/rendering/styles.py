"""Styles: a short template, its tokenizer, and the text that is trained on in one conversation."""

from dataclasses import dataclass, field

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from tests.data.rendering.simple_templates import (
    CHATML,
    CLOSED_THOUGHT,
    DEEPSEEK,
    DEFAULT_SYSTEM,
    GEMMA,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    PHI3,
    SWITCH,
    THINKING,
    VICUNA,
    ZEPHYR,
)
from tests.support import tiny


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


def supervised_texts(template, *turns, tools=(), special=IM, eos="<|im_end|>"):
    """The supervised texts of a conversation in a template; its ids are those of transformers."""
    tokenizer = tiny.build_tokenizer(template, special, eos)
    messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
    conversation = Conversation(messages, "a.json, record 3", tools)
    encoded = Renderer(tokenizer).encode(conversation)
    own = tokenizer.apply_chat_template(conversation.as_dicts(), tools=list(tools) or None, return_dict=False)
    assert encoded.input_ids == own
    return trained(tokenizer, encoded)


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


CHAT_WITHOUT_SYSTEM = Conversation(CHAT.messages[1:], CHAT.source)
