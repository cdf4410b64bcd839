"""The preview as an HTML page: its numbers, its marks, and data that looks like markup."""

import re

import numpy as np
import pytest

from sft_recipe.data.pretokenized import TokenizedRecord
from sft_recipe.data.preview.chinese import CHINESE, COUNTED
from sft_recipe.data.preview.html import length_histogram, page, percent_histogram
from sft_recipe.data.preview.stats import Settings
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.errors import DataError
from tests.data.preview.examples import conversation, decoded_turns, stats_of
from tests.support import tiny
from tests.support.html import NASTY, StrictParser
from tests.support.runs import ROOT


def hostile_page(renderer, count: int = 1) -> str:
    talks = [
        conversation(NASTY, f"Sure: {NASTY}", source=f"{NASTY}, record {number}") for number in range(1, count + 1)
    ]
    result = stats_of([*talks, DataError(f"{NASTY}: bad.")], renderer)
    return page(result, renderer, NASTY, NASTY, {talks[0].source: NASTY})


def test_token_ids_are_shown_as_their_text(renderer):
    [encoded] = renderer.encode_batch([conversation("Hello", "Fine.")])
    record = TokenizedRecord(encoded.input_ids, encoded.loss_mask, "a.jsonl, line 1")
    tokens, text = (stats_of([item], renderer) for item in (record, conversation("Hello", "Fine.")))
    assert tokens.lengths.tolist() == text.lengths.tolist() and tokens.supervised.tolist() == text.supervised.tolist()
    assert dict(tokens.patterns) == {("tokens",): 1}
    shown = "".join(StrictParser(page(tokens, renderer, "a", "b")).text)
    assert "a.jsonl, line 1" in shown and "not rendered" in shown and shown.count("Fine.") == 1


@pytest.mark.parametrize("count", [1, 3])
def test_data_cannot_become_markup(renderer, count):
    html = hostile_page(renderer, count)
    parsed = StrictParser(html)
    assert not parsed.tags & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert "<script" not in html and "49" not in "".join(parsed.text)
    assert f"Sure: {NASTY}" in "".join(parsed.text)


def test_a_token_cannot_become_markup():
    """`<script>` and `</s>` are single tokens here, which the page must escape."""
    template = tiny.CHATML.replace("<|im_start|>", "<script>").replace("<|im_end|>", "</s>")
    tokenizer = tiny.build_tokenizer(template, ["<pad>", "<script>", "</s>"], eos_token="</s>")
    parsed = StrictParser(
        page(stats_of([conversation("Hi", "Yes")], Renderer(tokenizer)), Renderer(tokenizer), "a", "tiny")
    )
    assert not parsed.tags & {"script", "s", "pad"}
    assert "<script>assistant⏎\nYes</s>⏎\n" in "".join(parsed.text)


def test_the_page_makes_no_network_request(renderer):
    html = hostile_page(renderer)
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|//\w|url\(|@import", html)
    assert all(value.startswith("#") for name, value in StrictParser(html).attributes if name == "href")


def test_the_page_shows_the_statistics(renderer):
    talks = [conversation("Hi", "Yes" * number, source=f"a, record {number}") for number in (1, 2, 3, 3)]
    result = stats_of(talks, renderer, Settings(max_length=10))
    words = " ".join(
        " ".join(StrictParser(page(result, renderer, "a.json", "tiny", {"a, record 3": "Hi → YesYes"})).text).split()
    )
    tokens = int(result.lengths.sum())
    assert f"Records 4 {tokens} tokens" in words
    assert f"Supervised {100 * result.supervised.sum() / tokens:.0f}% {result.supervised.sum()} tokens" in words
    assert f"Over MAX_LENGTH {(result.lengths > 10).sum()} left out" in words
    assert "Duplicates 1 exact copies" in words and "Hi → YesYes a, record 3; a, record 3 ×2" in words
    assert "4 of 4 conversations" in words and "user assistant 4" in words


def test_the_page_highlights_exactly_the_supervised_tokens(renderer, tokenizer):
    talk = ("<b>Hi</b>", "a < b && c &amp; 你好")
    result = stats_of([conversation(*talk)], renderer)
    html = page(result, renderer, "a.json", "tiny")
    body = html[html.index('<div class="tokens">') :]
    spans = re.findall(r'<span class="s(?: x)?">(.*?)</span>', body[: body.index("</article>")])
    shown = "".join("".join(StrictParser(span).text) for span in spans)
    assert shown == "".join(decoded_turns(tokenizer, result.sample[0]))


@pytest.mark.parametrize("limit", [1, 50, 199, 200, 10**6])
@pytest.mark.parametrize("tail", [[], [100_000], [100_000] * 40])
def test_a_histogram_counts_every_record_once(limit, tail):
    lengths = np.array([*np.random.default_rng(0).integers(1, 200, 500), 200, *tail])
    histogram = length_histogram(lengths, lengths > limit, limit)
    assert sum(bar.within for bar in histogram.bars) == (lengths <= limit).sum()
    assert sum(bar.over for bar in histogram.bars) == (lengths > limit).sum()
    assert len(histogram.bars) <= 50
    assert (histogram.beyond is None) == (lengths.max() < histogram.end)


@pytest.mark.parametrize("lengths", [[1], [2, 2], [5, 10**6]])
def test_a_histogram_of_few_records_counts_all_of_them(lengths):
    values = np.array(lengths)
    assert sum(bar.within for bar in length_histogram(values, values > 10**7, 10**7).bars) == len(lengths)


def test_the_percent_histogram_covers_0_to_100_percent():
    bars = percent_histogram(np.array([0, 0.049, 0.05, 0.5, 0.999, 1.0])).bars
    assert [(index, bar.within) for index, bar in enumerate(bars) if bar.within] == [(0, 2), (1, 1), (10, 1), (19, 2)]


def test_every_text_has_a_chinese_one():
    folder = ROOT / "sft_recipe/data/preview"
    source = (folder / "page.html").read_text(encoding="utf-8")
    used = set(re.findall(r'\bt\("([^"]+)"', source + (folder / "html.py").read_text(encoding="utf-8")))
    used |= set(re.findall(r'plot\(\w+, "([^"]+)"', source)) | {"{records} that cannot be used ({kinds}):"}
    assert len(used) > 50 and used == set(CHINESE)
    for english, chinese in CHINESE.items():
        assert sorted(re.findall(r"{.*?}", english)) == sorted(re.findall(r"{.*?}", chinese))
    assert set(re.findall(r'plural\("([^"]+)"\)', source)) | {"more token"} == set(COUNTED)


def test_a_chinese_page_has_no_english_sentences(renderer):
    talks = [conversation("你好", "好" * count, source=f"文件 {count}") for count in (1, 1, 90)]
    result = stats_of([*talks, DataError("文件：错误")], renderer, Settings(max_length=40))
    parsed = StrictParser(page(result, renderer, "数据", "模型", language="zh"))
    shown = " ".join(parsed.text)
    assert "3 条记录" in shown and "完全重复" in shown and "超过 MAX_LENGTH 40：舍弃这条记录" in shown
    known = "MAX_LENGTH BATCH_SIZE user assistant istan im_start im_end token drop fields"  # istan: a token
    assert not set(re.findall(r"[A-Za-z_]{3,}", shown)) - set(known.split())
    assert ("lang", "zh-CN") in parsed.attributes
