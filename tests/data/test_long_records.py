"""Records that are far too long are found without tokenizing them, and long ones are tokenized a few at a time."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from sft_recipe.config.schema import DataConfig
from sft_recipe.data import pipeline, tokenize
from sft_recipe.data.formats import to_conversation
from sft_recipe.data.notices import data_notices
from sft_recipe.data.rendering.annotate import Annotator
from sft_recipe.data.rendering.text_tokens import TextTokenizer
from sft_recipe.data.tokenize import split_by_size
from sft_recipe.errors import DataError
from tests.data.rendering.templates import STYLES
from tests.data.stores import RECORDS, build, encoded, examples, write
from tests.support import tiny

GIANT = {"prompt": "Count.", "response": "one two three four, " * 5000}


def lacking_byte():
    """Return a tokenizer whose vocabulary has no piece with the letter e."""
    core = json.loads(tiny.build_tokenizer().backend_tokenizer.to_str())
    vocabulary = {piece: number for piece, number in core["model"]["vocab"].items() if "e" not in piece}
    merges = [pair for pair in core["model"]["merges"] if "e" not in "".join(pair)]
    return Tokenizer.from_str(json.dumps(core | {"model": core["model"] | {"vocab": vocabulary, "merges": merges}}))


def with_nfc():
    core = tiny.build_tokenizer().backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.NFC()])
    return core


KNOWN = {"plain": tiny.build_tokenizer().backend_tokenizer, "nfc": with_nfc(), "lacking a byte": lacking_byte()}
LONG_PIECES = ["Hello there, how are you today? " * 40, " " * 500, "capital of France " * 30, "\u1100\u1161\u11a8" * 50]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.sampled_from(LONG_PIECES)
texts |= st.text("ab e\u0301\u212b\u1fef\u00e9 ", max_size=300)


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=150)
@given(text=texts)
def test_a_text_has_at_least_as_many_tokens(name, text):
    tokenizer = TextTokenizer(KNOWN[name])
    assert tokenizer.least_tokens(text) <= len(KNOWN[name].encode(text, add_special_tokens=False).ids)


def test_the_least_number_of_tokens_is_of_use():
    for tokenizer in map(TextTokenizer, KNOWN.values()):
        assert tokenizer.least_tokens(GIANT["response"]) > 500


def with_pre_tokenizer(first):
    core = tiny.build_tokenizer().backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel()])
    return core


def uncertain():
    stripping, greedy = tiny.build_tokenizer().backend_tokenizer, tiny.build_tokenizer()
    stripping.normalizer = normalizers.Strip()
    greedy.add_tokens([AddedToken("<|im_end|>", rstrip=True, special=True)])
    return {
        "white space": with_pre_tokenizer(pre_tokenizers.WhitespaceSplit()),
        "split": with_pre_tokenizer(pre_tokenizers.Split(" ", "removed")),
        "normalizer": stripping,
        "special token": greedy.backend_tokenizer,
        "sentencepiece": STYLES["llama2"].tokenizer("prepend").backend_tokenizer,
    }


@pytest.mark.parametrize(("name", "core"), uncertain().items())
def test_nothing_is_claimed_where_text_may_disappear(name, core):
    assert TextTokenizer(core).least_tokens(" " * 100_000) == 0


@pytest.fixture
def tokenized(monkeypatch):
    """The lengths of the texts that were tokenized."""
    lengths: list[int] = []
    call = TextTokenizer.__call__

    def record(self, texts):
        lengths.extend(map(len, texts))
        return call(self, texts)

    monkeypatch.setattr(TextTokenizer, "__call__", record)
    return lengths


def test_far_too_long_record_is_left_out_untokenized(tokenizer, cache_dir, tmp_path, tokenized):
    path = write(tmp_path / "a.json", [RECORDS[0], GIANT, RECORDS[1]])
    store = build(path, tokenizer, cache_dir, max_length=200)
    assert max(tokenized) < 1000
    report = store.report
    assert (report.records, report.examples, report.too_long, report.untokenized) == (3, 2, 1, 1)
    complete = encoded(tokenizer, path)
    assert examples(store) == [complete[0], complete[2]]
    assert 200 < report.longest <= len(complete[1][0])
    (notice,) = data_notices(report, "train", DataConfig(max_length=200), tmp_path)
    assert "1 of 3 examples (33.3%) longer than 200 tokens, left out" in notice
    assert f"the longest has more than {report.longest} tokens" in notice


def test_record_of_too_many_answers_is_left_out_without_locating_them(tokenizer, cache_dir, tmp_path, monkeypatch):
    """Each answer has an end token; locating ten thousand turns took minutes."""
    turns = [{"role": role, "content": "a"} for _ in range(201) for role in ("user", "assistant")]
    path = write(tmp_path / "a.json", [RECORDS[0], {"messages": turns}])
    rendered, locate = [], Annotator.annotate
    monkeypatch.setattr(
        Annotator, "annotate", lambda self, item: rendered.append(len(item.messages)) or locate(self, item)
    )
    report = build(path, tokenizer, cache_dir, max_length=200).report
    assert (report.examples, report.too_long, report.untokenized, rendered) == (1, 1, 1, [2])
    assert report.longest == 201 < len(encoded(tokenizer, path)[1][0])


def test_far_too_long_record_stops_or_is_cut(tokenizer, cache_dir, tmp_path):
    path = write(tmp_path / "a.json", [GIANT])
    with pytest.raises(DataError, match=r"a.json, record 1: more than \d+ tokens, longer than max_length=200; raise"):
        build(path, tokenizer, cache_dir, max_length=200, truncation="error")
    with pytest.raises(DataError, match=r"the longest has more than \d+\) .* set MAX_LENGTH to more than \d+"):
        build(path, tokenizer, cache_dir, max_length=200)
    (ids, mask) = encoded(tokenizer, path)[0]
    assert examples(build(path, tokenizer, cache_dir, max_length=200, truncation="right")) == [(ids[:200], mask[:200])]


def test_record_that_fits_is_never_left_out(tokenizer, cache_dir, tmp_path):
    path = write(tmp_path / "a.json", [GIANT])
    ids, mask = encoded(tokenizer, path)[0]
    assert examples(build(path, tokenizer, cache_dir, max_length=len(ids))) == [(ids, mask)]
    with pytest.raises(DataError, match=f"the longest has {len(ids)}\\)"):
        build(path, tokenizer, cache_dir, max_length=len(ids) - 1)


def test_long_records_are_read_and_encoded_a_few_at_a_time(many, tokenizer, tmp_path, monkeypatch):
    expected = build(many, tokenizer, tmp_path / "one")
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 1000)
    assert build(many, tokenizer, tmp_path / "other").report == expected.report
    monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", 3000)
    assert examples(build(many, tokenizer, tmp_path / "third")) == examples(expected)
    conversations = [
        to_conversation({"prompt": "x" * size, "response": "y"}, "") for size in (99, 1, 1500, 500, 497, 1)
    ]
    batches = list(split_by_size(conversations))
    assert [len(batch) for batch in batches] == [2, 1, 2, 1] and sum(batches, []) == conversations
