"""The preview in the terminal: its marks against the loss mask, and data with control characters."""

import re
from io import StringIO

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sft_recipe.data.preview.html import page
from sft_recipe.data.preview.stats import Settings
from sft_recipe.data.preview.terminal import CLOSE, OPEN, pattern, print_preview, text_of, tokens_of, visible
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.errors import DataError
from tests.data.preview.examples import conversation, decoded_turns, example_of, stats_of

TALKS = [
    ("Hi", "Hello there."),
    ("你好，今天天气怎么样？", "很好，谢谢。机器学习😀👩‍👩‍👧"),
    ("Say it\nin two lines.", "One \n  two\t three\n\n"),
    ("  spaces  ", " lead"),
    ("First", "One", "Second", "Two"),
]
TALK = pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))


@TALK
def test_token_texts_join_to_the_decoded_conversation(renderer, tokenizer, talk):
    example = example_of(renderer, *talk)
    tokens = tokens_of(example, renderer, 10**6)
    assert sum((token.ids for token in tokens), []) == example.encoded.input_ids
    assert "".join(token.text for token in tokens) == tokenizer.decode(example.encoded.input_ids)
    assert {token.text for token in tokens if token.is_special} == {"<|im_start|>", "<|im_end|>"}


def test_token_texts_of_a_sentencepiece_tokenizer_keep_spaces_and_bytes():
    """As in older Llama tokenizers: a token decoded alone loses its space; unknown characters become byte tokens."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz:",
        "▁a",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}"
        "{{ turn.role + ': ' + turn.content + (eos_token if turn.role == 'assistant' else ' ') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    renderer = Renderer(tokenizer)
    example = example_of(renderer, "你好 a", "a day  a 好😀")
    tokens = tokens_of(example, renderer, 10**6)
    assert "".join(token.text for token in tokens) == tokenizer.decode(example.encoded.input_ids)
    # The first "a" shares its token with the prompt's last space, and so is not supervised.
    assert "".join(token.text for token in tokens if token.is_supervised) == " day  a 好😀</s>"


@TALK
def test_brackets_enclose_exactly_the_supervised_tokens(renderer, tokenizer, talk):
    example = example_of(renderer, *talk)
    shown = text_of(tokens_of(example, renderer, 10**6), in_color=False).plain
    assert unmarked(shown.replace(OPEN, "").replace(CLOSE, "")) == tokenizer.decode(example.encoded.input_ids)
    supervised = re.findall(f"{OPEN}(.*?){CLOSE}", shown, re.DOTALL)
    assert [unmarked(text) for text in supervised] == decoded_turns(tokenizer, example)
    assert len(supervised) == len(talk) // 2


@TALK
def test_exactly_the_supervised_tokens_are_green(renderer, tokenizer, talk):
    example = example_of(renderer, *talk)
    text = text_of(tokens_of(example, renderer, 10**6), in_color=True)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert unmarked(green) == "".join(decoded_turns(tokenizer, example))


def test_spaces_at_edges_are_marked_and_dots_in_the_data_are_not(renderer):
    example = example_of(renderer, "Hi", " a · b  c \n  d··  ")
    shown = [
        part for token, parts in visible(tokens_of(example, renderer, 10**6)) if token.is_supervised for part in parts
    ]
    text, marks = "".join(part.text for part in shown), [part.text for part in shown if part.is_mark]
    assert text == "·a · b  c·⏎\n  d····<|im_end|>"
    assert "".join(marks).startswith("··⏎") and "".join(marks).endswith("··")


def test_a_conversation_is_displayed_up_to_max_length(renderer, tokenizer):
    example = example_of(renderer, "Hi", "Hello there, how are you today?")
    limit = example.tokens - 5
    assert sum(len(token.ids) for token in tokens_of(example, renderer, limit)) == limit
    out, result = StringIO(), stats_of([example.record], renderer, Settings(max_length=limit, truncation="right"))
    print_preview(result, renderer, Console(file=out))
    shown = tokenizer.decode(example.encoded.input_ids[:limit]).rpartition("\n")[2]
    assert f"{OPEN}{shown}{CLOSE}✂ 5 more tokens\n" in out.getvalue()
    assert (
        "5 more tokens</b>" in page(result, renderer, "a", "tiny") and "cut off at the end: 5 tokens" in out.getvalue()
    )


def test_control_characters_in_the_data_never_reach_the_terminal(renderer):
    evil = "\x1b[2J\x1b]0;title\x07 \x9b31m \r \x00 \u202eabc\u2069 \u200b[bold]no[/bold]"
    out = StringIO()
    result = stats_of([conversation("Hi", evil, source="a\x1b[31m.json, record 1")], renderer)
    result.reject(DataError(f"b.json: {evil}."))
    print_preview(result, renderer, Console(file=out, highlight=False))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\u2069]", out.getvalue())
    assert "␛[2J" in out.getvalue() and "<U+202E>abc" in out.getvalue() and "[bold]no[/bold]" in out.getvalue()


def test_long_lines_are_not_wrapped_in_a_pipe(renderer):
    out = StringIO()
    print_preview(stats_of([conversation("Hi", "word " * 100 + "end")], renderer), renderer, Console(file=out))
    assert "word " * 100 + f"end<|im_end|>{CLOSE}⏎" in out.getvalue()


def unmarked(text: str) -> str:
    """The text without the marks for white space."""
    return text.replace("⏎\n", "\n").replace("⇥\t", "\t").replace("·", " ")


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ("u a", "user, assistant"),
        ("s u a u a u a", "system, (user, assistant) x 3"),
        ("u a t a t a", "user, (assistant, tool) x 2, assistant"),
        ("u u a", "(user) x 2, assistant"),
        ("s u a u", "system, user, assistant, user"),
    ],
)
def test_role_patterns_combine_repetitions(roles, words):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    assert pattern([names[letter] for letter in roles.split()]) == words


def test_visible_returns_all_tokens_unchanged(renderer):
    tokens = tokens_of(example_of(renderer, "  Hi  ", " a \n b "), renderer, 10**6)
    assert [token for token, _ in visible(tokens)] == tokens


def test_lengths_in_characters_are_beside_those_in_tokens(renderer):
    talks = [conversation("Hi", "你好，今天"), conversation("Say it.", "It 😀!"), conversation("a" * 40, "b" * 60)]
    stats, out = stats_of(talks, renderer), StringIO()
    print_preview(stats, renderer, Console(file=out, width=200))
    text = out.getvalue()
    for talk, example in zip(talks, stats.sample, strict=True):
        count = sum(len(message.content) for message in talk.messages)
        assert example.characters == count
        assert f"{len(example.encoded.input_ids)} tokens of {count} characters, loss on " in text
    ratio = (7 + 12 + 100) / stats.lengths.sum()
    assert f"texts: median 12, p95 12, max 100 characters; {ratio:.2f} characters a token" in text
    shown = " ".join(page(stats, renderer, "data", "model").split())
    assert "in characters: median 12, p95 12, max 100" in shown
