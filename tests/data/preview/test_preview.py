"""The preview's numbers against arithmetic by hand, its marks against the mask, its page against hostile data."""

import re
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.preview import stats as preview
from sft_recipe.data.preview.html import length_histogram, page, share_histogram
from sft_recipe.data.preview.stats import DatasetStats, Example, Repeated, Settings, SourceCounts
from sft_recipe.data.preview.terminal import CLOSE, OPEN, pattern, print_preview, summary, text_of, tokens_of, visible
from sft_recipe.data.rendering.renderer import Encoded, Renderer
from sft_recipe.errors import DataError
from tests.support import tiny

NASTY = "<script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7 * 7 }} \" onload='x' </title></style><!--"


def conversation(*said: str, source: str = "") -> Conversation:
    """Turns of user and assistant."""
    roles = ["user", "assistant"] * len(said)
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, said, strict=False)), source)


def surveyed(*masks: str, **settings) -> DatasetStats:
    """A survey of examples given by their masks: "0011" has four tokens, the last two supervised."""
    result = DatasetStats(Settings(**settings))
    for number, mask in enumerate(masks, 1):
        bits = [int(bit) for bit in mask]
        ids = [7] * len(bits) if number % 2 else [8] * len(bits)
        result.add(conversation("Hi", "Yes", source=f"a.json, record {number}"), Encoded(ids, bits))
    return result


def stats(records, renderer: Renderer, settings: Settings | None = None) -> DatasetStats:
    """A survey of records as they come from files."""
    result = DatasetStats(settings or Settings())
    result.read(records, renderer)
    return result


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def example_of(renderer, *said: str) -> Example:
    talk = conversation(*said)
    return Example(0, talk, renderer.encode(talk))


# Numbers

FOUR = ("0011", "0001111100", "000001", "01")  # 4, 10, 6 and 2 tokens


def test_lengths_and_supervised_are_those_of_every_record():
    result = surveyed(*FOUR)
    assert result.records == 4
    assert result.lengths.tolist() == [4, 10, 6, 2]
    assert result.supervised.tolist() == [2, 5, 1, 1]


def test_what_drop_loses_is_the_whole_record():
    loss = surveyed(*FOUR, max_length=6, truncation="drop").truncation()
    assert (loss.records, loss.tokens, loss.supervised, loss.without_target) == (1, 10, 5, 0)
    assert loss.lengths.tolist() == [4, 6, 2]


def test_what_right_loses_is_the_end():
    loss = surveyed(*FOUR, max_length=6, truncation="right").truncation()
    assert (loss.records, loss.tokens, loss.supervised, loss.without_target) == (1, 4, 2, 0)
    assert loss.lengths.tolist() == [4, 6, 6, 2]


def test_a_record_of_which_no_supervised_token_is_left_is_left_out():
    loss = surveyed("0011", "00000011", "000", max_length=5, truncation="right").truncation()
    assert (loss.records, loss.tokens, loss.supervised, loss.without_target) == (1, 3, 2, 2)
    assert loss.lengths.tolist() == [4]


def test_a_record_as_long_as_the_limit_is_not_too_long():
    assert surveyed(*FOUR, max_length=10).truncation().records == 0


def test_packing_saves_what_padding_would_fill():
    """Batches (4, 6) and (2): padded 12 + 2; budget 6 holds one of the first two at a time."""
    result = surveyed(*FOUR, max_length=6, batch_size=2, token_budget=6, shuffle=False).packing()
    assert (result.padded, result.packed, result.steps, result.micro_batches, result.capacity) == (14, 12, 2, 3, 18)
    assert result.saved == pytest.approx(2 / 14)


def test_packing_follows_the_order_of_the_first_epoch():
    masks = ["0" * (length - 1) + "1" for length in (9, 2, 8, 3, 7, 4)]
    batches = list(preview.epoch_batches(6, Settings(batch_size=2, seed=3)))
    padded = sum(2 * max(len(masks[number]) for number in batch) for batch in batches)
    assert sorted(number for batch in batches for number in batch) == list(range(6))
    assert surveyed(*masks, batch_size=2, seed=3).packing().padded == padded


def test_packing_mixes_the_sources_as_training_does():
    """Twice the first source's 4 and 2 tokens (10 is too long), one of the second's two records."""
    result = DatasetStats(Settings(max_length=6, batch_size=1, token_budget=6))
    for mask in ("0011", "0001111100", "01"):
        result.add(conversation("Hi", "Yes"), Encoded([7] * len(mask), [int(bit) for bit in mask]))
    result.end_source("a.json", lambda examples: 2 * examples)
    for mask in ("011", "101"):
        result.add(conversation("Hi", "Yes"), Encoded([7] * 3, [int(bit) for bit in mask]))
    result.end_source("b.json", lambda examples: 1)
    assert result.truncation().sources == [SourceCounts("a.json", 2, 4), SourceCounts("b.json", 2, 1)]
    assert (result.packing().packed, result.packing().steps) == (4 + 4 + 2 + 2 + 3, 5)
    assert "an epoch holds 4 of 2 from a.json, 1 of 2 from b.json" in summary(result)


def test_a_source_of_which_nothing_is_left_does_no_harm():
    result = DatasetStats(Settings(max_length=2))
    for mask in ("0011", "01"):
        result.add(conversation("Hi", "Yes"), Encoded([7] * len(mask), [int(bit) for bit in mask]))
        result.end_source("a.json", lambda examples: 5)
    assert result.packing().packed == 10
    nothing = surveyed("0011", max_length=2).packing()
    assert (nothing.packed, nothing.steps, nothing.saved) == (0, 0, 0.0)


def test_text_that_spells_a_special_token_is_counted_and_not_shown_as_one(renderer):
    result = stats([conversation("Hi", "Yes"), conversation("<|im_end|>", "Say <|im_start|>user")], renderer)
    tokens = tokens_of(result.sample[1], renderer, 10**6)
    assert result.special_text == 1 and "1 record with text that spells a special token" in summary(result)[-1]
    assert sum(token.is_special for token in tokens) == 4
    assert "".join(token.text for token in tokens if token.is_supervised) == "Say <|im_start|>user<|im_end|>"


def test_duplicates_are_counted_with_their_places():
    """Of five records 1, 3 and 5 are the same; 2 and 4 differ in ids, 6 in its mask alone."""
    result = surveyed("0011", "0011", "0011", "001", "0011", "0011", "0101")
    repeats, repeated = result.duplicates()
    assert repeats == 3
    first = Repeated(3, ["a.json, record 1", "a.json, record 3", "a.json, record 5"])
    assert repeated == [first, Repeated(2, ["a.json, record 2", "a.json, record 6"])]


@pytest.mark.parametrize("source", ["a.json, record 12", "b.jsonl, line 007", "", "12", "a, record 0", "a " + "9" * 30])
def test_places_come_back_as_they_were(source):
    places = preview._Places()
    for text in ("x, record 1", source, "x, record 2"):
        places.append(text)
    assert [places[index] for index in range(3)] == ["x, record 1", source, "x, record 2"]


def test_the_longest_and_the_emptiest_come_in_order_the_earlier_first():
    result = surveyed("0011", "001", "000001", "01", "0111", "011", "000011")
    assert [example.number for example in result.longest] == [2, 6, 0, 4, 1]
    assert [example.number for example in result.emptiest] == [1, 2, 3, 0, 5]


def test_the_sample_is_seeded_in_order_and_grows():
    def numbers(show: int, seed: int = 1) -> list[int]:
        result = DatasetStats(Settings(seed=seed), show)
        for number in range(100):
            result.add(conversation("Hi", "Yes"), Encoded([number, 1], [0, 1]))
        return [example.number for example in result.sample]

    assert numbers(5) == numbers(5) == sorted(numbers(5)) != numbers(5, seed=2)
    assert set(numbers(5)) < set(numbers(20))
    assert numbers(0) == [] and numbers(1000) == list(range(100))


def test_bad_records_are_rejected_with_their_reason_and_the_others_counted(tokenizer):
    refuses = tiny.CHATML.replace(
        "{% for", "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    talks = [conversation(text, "Yes", source=f"a, record {n}") for n, text in enumerate(["Hi", "bad", "Hello"], 1)]
    records = [talks[0], DataError("a, record 9: broken.", "malformed"), *talks[1:]]
    done = []
    result = DatasetStats()
    result.read(records, Renderer(tokenizer, chat_template=refuses), done.append)
    assert (result.records, result.rejected, sum(done)) == (2, 2, 4)
    assert result.reasons[0] == "a, record 9: broken." and result.reasons[1].startswith("a, record 2: ")
    assert [example.conversation.source for example in result.sample] == ["a, record 1", "a, record 3"]
    lines = summary(result)[-2:]
    assert lines == [
        "2 records rejected (1 malformed, 1 template), which stops training; the first:",
        "  a, record 9: broken.",
    ]


def test_chunks_change_nothing(renderer, monkeypatch):
    talks = [
        conversation("Hi " * number, "Yes " * (number % 4 + 1), source=f"a, record {number}") for number in range(1, 12)
    ]
    whole = stats(talks, renderer)
    monkeypatch.setattr(preview, "CHUNK", 3)
    assert stats(talks, renderer).lengths.tolist() == whole.lengths.tolist()
    assert whole.lengths.tolist() == [len(renderer.encode(talk).input_ids) for talk in talks]


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
def test_role_patterns_are_short(roles, words):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    assert pattern([names[letter] for letter in roles.split()]) == words


# Marks

TALKS = [
    ("Hi", "Hello there."),
    ("你好，今天天气怎么样？", "很好，谢谢。机器学习😀👩‍👩‍👧"),
    ("Say it\nin two lines.", "One \n  two\t three\n\n"),
    ("  spaces  ", " lead"),
    ("First", "One", "Second", "Two"),
]
TALK = pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))


@TALK
def test_tokens_show_what_all_of_them_decode_to(renderer, tokenizer, talk):
    example = example_of(renderer, *talk)
    tokens = tokens_of(example, renderer, 10**6)
    assert sum((token.ids for token in tokens), []) == example.encoded.input_ids
    assert "".join(token.text for token in tokens) == tokenizer.decode(example.encoded.input_ids)
    assert {token.text for token in tokens if token.is_special} == {"<|im_start|>", "<|im_end|>"}


def test_tokens_of_a_tokenizer_that_spells_spaces_and_bytes():
    """Llama's older kind: decoded alone a token loses its space, and what the vocabulary lacks comes in bytes."""
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
def test_brackets_stand_around_exactly_the_supervised_tokens(renderer, tokenizer, talk):
    example = example_of(renderer, *talk)
    shown = text_of(tokens_of(example, renderer, 10**6), in_colour=False).plain
    assert unmarked(shown.replace(OPEN, "").replace(CLOSE, "")) == tokenizer.decode(example.encoded.input_ids)
    supervised = re.findall(f"{OPEN}(.*?){CLOSE}", shown, re.DOTALL)
    assert [unmarked(text) for text in supervised] == decoded_turns(tokenizer, example)
    assert len(supervised) == len(talk) // 2


@TALK
def test_colours_stand_on_exactly_the_supervised_tokens(renderer, tokenizer, talk):
    example = example_of(renderer, *talk)
    text = text_of(tokens_of(example, renderer, 10**6), in_colour=True)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert unmarked(green) == "".join(decoded_turns(tokenizer, example))


def decoded_turns(tokenizer, example: Example) -> list[str]:
    ids, mask = example.encoded.input_ids, example.encoded.loss_mask
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


def unmarked(text: str) -> str:
    """Without what makes white space visible."""
    return text.replace("⏎\n", "\n").replace("⇥\t", "\t").replace("·", " ")


def test_spaces_at_edges_are_marked_and_dots_of_the_data_are_not(renderer):
    example = example_of(renderer, "Hi", " a · b  c \n  d··  ")
    shown = [
        part for token, parts in visible(tokens_of(example, renderer, 10**6)) if token.is_supervised for part in parts
    ]
    text, marks = "".join(part.text for part in shown), [part.text for part in shown if part.is_mark]
    assert text == "·a · b  c·⏎\n  d····<|im_end|>"
    assert "".join(marks).startswith("··⏎") and "".join(marks).endswith("··")


def test_a_conversation_is_shown_as_far_as_max_length(renderer, tokenizer):
    example = example_of(renderer, "Hi", "Hello there, how are you today?")
    limit = example.tokens - 5
    assert sum(len(token.ids) for token in tokens_of(example, renderer, limit)) == limit
    out, result = StringIO(), stats([example.conversation], renderer, Settings(max_length=limit, truncation="right"))
    print_preview(result, renderer, Console(file=out))
    shown = tokenizer.decode(example.encoded.input_ids[:limit]).rpartition("\n")[2]
    assert f"{OPEN}{shown}{CLOSE}✂ 5 more tokens\n" in out.getvalue()
    assert "5 more tokens</b>" in page(result, renderer, "a", "tiny") and "5 tokens are cut" in out.getvalue()


def test_nothing_in_the_data_acts_on_a_terminal(renderer):
    evil = "\x1b[2J\x1b]0;title\x07 \x9b31m \r \x00 \u202eabc\u2069 \u200b[bold]no[/bold]"
    out = StringIO()
    result = stats([conversation("Hi", evil, source="a\x1b[31m.json, record 1")], renderer)
    result.reject(DataError(f"b.json: {evil}."))
    print_preview(result, renderer, Console(file=out, highlight=False))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\u2069]", out.getvalue())
    assert "␛[2J" in out.getvalue() and "<U+202E>abc" in out.getvalue() and "[bold]no[/bold]" in out.getvalue()


def test_in_a_pipe_lines_stay_whole(renderer):
    out = StringIO()
    print_preview(stats([conversation("Hi", "word " * 100 + "end")], renderer), renderer, Console(file=out))
    assert "word " * 100 + f"end<|im_end|>{CLOSE}⏎" in out.getvalue()


# Page


class Strict(HTMLParser):
    """Every element that opens closes in order; remembers tags, attributes and text."""

    VOID = {"meta", "input", "rect", "line"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def hostile_page(renderer, count: int = 1) -> str:
    talks = [
        conversation(NASTY, f"Sure: {NASTY}", source=f"{NASTY}, record {number}") for number in range(1, count + 1)
    ]
    result = stats([*talks, DataError(f"{NASTY}: bad.")], renderer)
    return page(result, renderer, NASTY, NASTY, {talks[0].source: NASTY})


@pytest.mark.parametrize("count", [1, 3])
def test_data_cannot_become_markup(renderer, count):
    html = hostile_page(renderer, count)
    parsed = Strict(html)
    assert not parsed.tags & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert "<script" not in html and "49" not in "".join(parsed.text)
    assert f"Sure: {NASTY}" in "".join(parsed.text)


def test_a_token_cannot_become_markup():
    """`<script>` and `</s>` as single tokens: nothing around them could keep them from being elements."""
    template = tiny.CHATML.replace("<|im_start|>", "<script>").replace("<|im_end|>", "</s>")
    tokenizer = tiny.build_tokenizer(template, ["<pad>", "<script>", "</s>"], eos_token="</s>")
    parsed = Strict(page(stats([conversation("Hi", "Yes")], Renderer(tokenizer)), Renderer(tokenizer), "a", "tiny"))
    assert not parsed.tags & {"script", "s", "pad"}
    assert "<script>assistant⏎\nYes</s>⏎\n" in "".join(parsed.text)


def test_the_page_asks_nothing_of_a_network(renderer):
    html = hostile_page(renderer)
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|//\w|url\(|@import", html)
    assert all(value.startswith("#") for name, value in Strict(html).attributes if name == "href")


def test_the_page_shows_the_numbers_of_the_survey(renderer):
    talks = [conversation("Hi", "Yes" * number, source=f"a, record {number}") for number in (1, 2, 3, 3)]
    result = stats(talks, renderer, Settings(max_length=10))
    words = " ".join(
        " ".join(Strict(page(result, renderer, "a.json", "tiny", {"a, record 3": "Hi → YesYes"})).text).split()
    )
    tokens = int(result.lengths.sum())
    assert f"Records 4 {tokens} tokens" in words
    assert f"Supervised {100 * result.supervised.sum() / tokens:.0f}% {result.supervised.sum()} tokens" in words
    assert f"Over MAX_LENGTH {(result.lengths > 10).sum()} left out" in words
    assert "Duplicates 1 exact" in words and "Hi → YesYes a, record 3; a, record 3 ×2" in words
    assert "4 of 4 conversations" in words and "user assistant 4" in words


def test_the_page_marks_the_supervised_tokens(renderer, tokenizer):
    talk = ("<b>Hi</b>", "a < b && c &amp; 你好")
    result = stats([conversation(*talk)], renderer)
    html = page(result, renderer, "a.json", "tiny")
    body = html[html.index('<div class="tokens">') :]
    spans = re.findall(r'<span class="s(?: x)?">(.*?)</span>', body[: body.index("</article>")])
    shown = "".join("".join(Strict(span).text) for span in spans)
    assert shown == "".join(decoded_turns(tokenizer, result.sample[0]))


@pytest.mark.parametrize("limit", [1, 50, 199, 200, 10**6])
@pytest.mark.parametrize("tail", [[], [100_000], [100_000] * 40])
def test_a_histogram_holds_every_record_once(limit, tail):
    lengths = np.array([*np.random.default_rng(0).integers(1, 200, 500), 200, *tail])
    histogram = length_histogram(lengths, limit)
    assert sum(bar.within for bar in histogram.bars) == (lengths <= limit).sum()
    assert sum(bar.over for bar in histogram.bars) == (lengths > limit).sum()
    assert len(histogram.bars) <= 50
    assert (histogram.beyond is None) == (lengths.max() < histogram.end)


@pytest.mark.parametrize("lengths", [[1], [2, 2], [5, 10**6]])
def test_a_histogram_of_few_records(lengths):
    assert sum(bar.within for bar in length_histogram(np.array(lengths), 10**7).bars) == len(lengths)


def test_shares_from_nothing_to_all():
    bars = share_histogram(np.array([0, 0.049, 0.05, 0.5, 0.999, 1.0])).bars
    assert [(index, bar.within) for index, bar in enumerate(bars) if bar.within] == [(0, 2), (1, 1), (10, 1), (19, 2)]


def test_visible_changes_no_token(renderer):
    tokens = tokens_of(example_of(renderer, "  Hi  ", " a \n b "), renderer, 10**6)
    assert [token for token, _ in visible(tokens)] == tokens
