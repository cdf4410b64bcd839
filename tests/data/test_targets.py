"""Stores of sources and targets: each has its largest length, and messages can be cut by characters."""

import json

import pytest

from sft_recipe.config.compose import load_config
from sft_recipe.data.notices import data_notices
from sft_recipe.data.pipeline import open_store, read_data
from sft_recipe.data.token_store import StoreOptions
from sft_recipe.errors import DataError
from tests.data import stores
from tests.support import seq2seq
from tests.support.tiny import build_tokenizer

EOS = 1
RECORDS = [("1 2", "3 4"), ("1 2 3 4 5 6 7 8 9", "3 4"), ("1 2", "3 4 5 6 7 8 9 0 1")]


@pytest.fixture
def build(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in RECORDS))

    def store(truncation):
        options = StoreOptions(max_length=6, max_target_length=8, truncation=truncation)
        return open_store([data], seq2seq.build_tokenizer("$A </s>"), options, tmp_path / "cache", workers=1)

    return store


def sides(store, index):
    ids, mask = (part.tolist() for part in store[index])
    count = mask.count(0)
    assert mask == [0] * count + [1] * (len(mask) - count)
    return ids[:count], ids[count:]


def test_a_record_with_one_side_too_long_is_dropped_and_both_lengths_are_named(build):
    store = build("drop")
    tokenizer = seq2seq.build_tokenizer("$A </s>")
    assert len(store) == 1 and sides(store, 0) == tuple(tokenizer(text)["input_ids"] for text in RECORDS[0])
    longest = [max(len(tokenizer(record[side])["input_ids"]) for record in RECORDS) for side in (0, 1)]
    assert [store.report.longest, store.report.longest_target] == longest
    data = load_config(["data.max_length=6", "data.max_target_length=8"]).data
    [notice] = data_notices(store.report, "train", data, store.folder)
    assert "longer than 6 (source) or 8 tokens (answer)" in notice
    assert f"the longest have {longest[0]} and {longest[1]}" in notice


def test_a_cut_source_keeps_its_end_token_and_a_cut_target_does_not(build):
    store = build("right")
    tokenizer = seq2seq.build_tokenizer("$A </s>")
    full = [[tokenizer(text)["input_ids"] for text in record] for record in RECORDS]
    assert sides(store, 1) == ([*full[1][0][:5], EOS], full[1][1])
    assert sides(store, 2) == (full[2][0], full[2][1][:8])


def test_the_side_that_is_too_long_is_named(build):
    with pytest.raises(DataError, match=r"data.jsonl, line 2: \d+ tokens, longer than max_length=6"):
        build("error")


def test_where_all_are_too_long_both_lengths_are_named(build, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": RECORDS[1][0], "response": RECORDS[2][1]}) + "\n")
    with pytest.raises(DataError, match=r"max_length=6 \(source\) or max_target_length=8 .*the longest have 10 and 11"):
        build("drop")


def test_messages_are_cut_by_characters(tmp_path):
    path = tmp_path / "data.json"
    turns = [("user", "机器学习"), ("assistant", "人工智能的一个分支"), ("user", "ok"), ("assistant", "好")]
    path.write_text(json.dumps([{"messages": [{"role": role, "content": text} for role, text in turns]}]))
    [found] = read_data(path, max_chars=3)
    assert [message.content for message in found.messages] == ["机器学", "人工智", "ok", "好"]


def test_records_with_cut_texts_are_counted(tmp_path):
    pairs = [("abc", "abcd"), ("abcd", "abc"), ("abcde", "abcde"), ("abc", "abc")]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in pairs))
    reports = [
        stores.build(path, build_tokenizer(), tmp_path / "cache", max_length=99, max_chars=size).report
        for size in (3, None)
    ]
    assert [list(report.remarks.sentences()) for report in reports] == [
        ["3 records with a text cut by data.max_chars; a cut answer is trained to end there"], []
    ]  # fmt: skip
