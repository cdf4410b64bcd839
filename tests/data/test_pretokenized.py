"""The format `tokens`: ids and labels are trained on as given, and anything else is an error that names the place."""

import json
import re

import pytest

from sft_recipe.data.formats import convert, read_conversations
from sft_recipe.data.pretokenized import TokenizedRecord, check_no_padding
from sft_recipe.errors import DataError
from tests.data.files import RECORDS, write
from tests.data.stores import build, examples
from tests.support.tiny import build_tokenizer

IDS = [5, 6, 7, 8]


def record_of(**fields):
    return convert(fields, "a, record 1")


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": [-100, -100, 7, 8]},
        {"loss_mask": [0, 0, 1, 1]},
        {"loss_mask": [False, False, True, True]},
        {"labels": [-100, -100, 7, 8], "loss_mask": None, "attention_mask": [1, 1, 1, 1]},
        {"labels": "[-100, -100, 7, 8]"},
    ],
)
def test_labels_and_mask_are_two_spellings(fields):
    record = record_of(input_ids=IDS, **fields)
    assert record == TokenizedRecord(IDS, [0, 0, 1, 1], "a, record 1")
    assert all(type(value) is int for value in record.loss_mask)


def test_text_beside_token_ids_is_rendered_and_other_keys_are_named():
    assert convert({**RECORDS["alpaca"], "input_ids": IDS, "labels": IDS}, "a") == convert(RECORDS["alpaca"], "a")
    assert record_of(input_ids=IDS, loss_mask=[0, 1, 1, 1], id="7").unread == ("id",)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"labels": [-100, -100, 7]}, "labels has 3 values, but input_ids has 4"),
        ({"labels": [-100, 6, 8, 8]}, "labels[2] is 8; expected -100, or 7 as in input_ids (labels are not shifted)"),
        ({"labels": [-100, -1, 7, 8]}, "labels[1] is -1"),
        ({"labels": IDS}, "labels[0] is 5; expected -100, since nothing predicts the first token"),
        ({"loss_mask": [1, 1, 1, 1]}, "loss_mask[0] is 1; expected 0"),
        ({"loss_mask": [0, 1, 2, 1]}, "loss_mask[2] is 2; expected 0, or 1"),
        ({"loss_mask": [0, 0, 1, 1], "labels": [-100, 6, 7, 8]}, "both labels and loss_mask"),
        ({}, "neither labels and loss_mask"),
        ({"labels": "yes"}, "labels is text; expected a list of whole numbers"),
        ({"labels": [-100, 6.0, 7, 8]}, "labels[1] is 6.0; expected a whole number"),
        ({"labels": [-100, None, 7, 8]}, "labels[1] is null; expected a whole number"),
        ({"labels": []}, "labels is an empty list"),
        ({"input_ids": [1, 2, True]}, "input_ids[2] is true or false; expected a whole number"),
        ({"input_ids": "[1, false]"}, "input_ids[1] is true or false; expected a whole number"),
        ({"labels": [-100, True, 7, 8]}, "labels[1] is true or false; expected a whole number"),
        ({"input_ids": []}, "input_ids is an empty list"),
        ({"input_ids": [5, -6]}, "input_ids[1] is -6; expected a token id"),
        ({"input_ids": [5, 2**31]}, "input_ids[1] is 2147483648; expected a token id"),
        ({"input_ids": 5}, "input_ids is a number; expected a list"),
        (
            {"attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, -100]},
            "attention_mask[3] is 0",
        ),
    ],
)
def test_anything_else_is_an_error(fields, problem):
    with pytest.raises(DataError) as caught:
        record_of(**{"input_ids": IDS, **fields})
    assert str(caught.value).startswith("a, record 1: ") and problem in str(caught.value)


@pytest.mark.parametrize("labels", [[7, 8, 9], [7, 8, 9, -100, -100]])
def test_labels_of_an_encoder_decoder_model_are_its_target(labels):
    record = convert({"input_ids": [5, 6], "labels": labels}, "a", is_encoder_decoder=True)
    assert (record.input_ids, record.loss_mask) == ([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (None, "labels are missing"),
        ([-100], "labels has no token"),
        ([7, -100, 8], "labels[1] is -100; expected a token id"),
    ],
)
def test_target_without_ids_is_an_error(labels, problem):
    with pytest.raises(DataError) as caught:
        convert({"input_ids": [5, 6], "labels": labels}, "a", is_encoder_decoder=True)
    assert problem in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_store_holds_the_ids_of_the_files(tmp_path, suffix):
    records = [
        {"input_ids": [3, 4, 5], "labels": [-100, 4, -100]},
        {"input_ids": [6, 7, 8, 9, 10, 11], "labels": [-100, -100, -100, 9, 10, 11]},
        {"input_ids": [12, 13], "labels": [-100, -100]},
    ]
    path = write(tmp_path / f"tokens{suffix}", records)
    store = build(path, build_tokenizer(), tmp_path / "cache", max_length=5, truncation="right")
    assert examples(store) == [([3, 4, 5], [0, 1, 0]), ([6, 7, 8, 9, 10], [0, 0, 0, 1, 1])]
    assert store.report.too_long == store.report.without_target == 1
    assert len(build(path, build_tokenizer(), tmp_path / "cache", max_length=5, format="tokens")) == 1


def test_conversations_and_token_ids_keep_their_order(tmp_path):
    tokenizer, tokens = build_tokenizer(), {"input_ids": [3, 4], "loss_mask": [0, 1]}
    chat = {"prompt": "Hello", "response": "Fine."}
    [rendered] = examples(build(write(tmp_path / "a.jsonl", [chat]), tokenizer, tmp_path / "cache"))
    store = build(write(tmp_path / "b.jsonl", [tokens, chat, tokens]), tokenizer, tmp_path / "cache")
    assert examples(store) == [([3, 4], [0, 1]), rendered, ([3, 4], [0, 1])]


def test_id_outside_the_vocabulary_is_an_error(tmp_path):
    tokenizer = build_tokenizer()
    largest = max(tokenizer.get_vocab().values())
    good, bad = ({"input_ids": [3, token], "loss_mask": [0, 1]} for token in (largest, largest + 1))
    assert len(build(write(tmp_path / "good.jsonl", [good]), tokenizer, tmp_path / "cache")) == 1
    path = write(tmp_path / "bad.jsonl", [good, bad])
    with pytest.raises(DataError) as caught:
        build(path, tokenizer, tmp_path / "cache")
    assert f"line 2: the token id {largest + 1} is not in the vocabulary" in str(caught.value)
    store = build(path, tokenizer, tmp_path / "cache", on_bad_record="skip")
    assert len(store) == 1
    assert json.loads((store.folder / "rejected.jsonl").read_text())["record"] == bad


PAD, EOS = 0, 1


@pytest.mark.parametrize(
    ("ids", "mask", "pad", "has_targets", "problem"),
    [
        ([5, 6, EOS, PAD], [0, 1, 1, 0], PAD, False, "input_ids ends with 1 pad token (id 0)"),
        ([5, 6, EOS, PAD, PAD], [0, 1, 1, 1, 1], PAD, False, "input_ids ends with 2 pad tokens"),
        ([PAD, PAD, 5, 6], [0, 0, 0, 1], PAD, False, "input_ids begins with 2 pad tokens"),
        ([5, 6, EOS, EOS], [0, 1, 1, 1], EOS, False, "input_ids ends with 2 pad tokens"),
        ([5, EOS, PAD, 6, EOS], [0, 0, 0, 1, 1], PAD, True, "input_ids ends with 1 pad token"),
        ([5, EOS, 6, EOS, PAD], [0, 0, 1, 1, 1], PAD, True, "labels ends with 1 pad token"),
        ([5, 6, EOS], [0, 1, 1], PAD, False, None),
        ([5, 6, EOS], [0, 1, 1], EOS, False, None),  # a tokenizer whose pad is eos
        ([5, 6, PAD], [0, 1, 1], PAD, False, None),  # a base model learns to end with it
        ([PAD, 5, 6, EOS], [0, 0, 1, 1], PAD, False, None),  # a model that begins with it
        ([5, PAD, PAD, 6, EOS], [0, 0, 0, 1, 1], PAD, False, None),
        ([5, EOS, 6, EOS], [0, 0, 1, 1], PAD, True, None),
        ([5, EOS, 6, EOS], [0, 0, 1, 1], EOS, True, None),
        ([5, 6, PAD, PAD], [0, 1, 1, 1], None, False, None),
    ],
)
def test_padding_is_an_error(ids, mask, pad, has_targets, problem):
    record = TokenizedRecord(ids, mask, "a.jsonl, line 1")
    if problem is None:
        check_no_padding(record, pad, EOS, has_targets)
        return
    with pytest.raises(DataError, match="^a.jsonl, line 1: " + re.escape(problem)):
        check_no_padding(record, pad, EOS, has_targets)


def test_a_store_refuses_padded_records(tmp_path):
    tokenizer = build_tokenizer()
    ids = [3, 4, tokenizer.pad_token_id, tokenizer.pad_token_id]
    path = write(tmp_path / "tokens.jsonl", [{"input_ids": ids, "loss_mask": [0, 1, 0, 0]}])
    with pytest.raises(DataError, match="line 1: input_ids ends with 2 pad tokens .* remove the padding"):
        build(path, tokenizer, tmp_path / "cache")


def test_conversations_are_expected_elsewhere(tmp_path):
    path = write(tmp_path / "tokens.jsonl", [{"input_ids": [3, 4], "loss_mask": [0, 1]}])
    with pytest.raises(DataError, match="line 1: the record holds token ids"):
        list(read_conversations(path))


def test_pretraining_text_is_an_error_that_names_the_formats(tmp_path):
    path = write(tmp_path / "text.jsonl", [{"text": "Once upon a time"}])
    with pytest.raises(DataError, match=r"one text \(text\).*prompt_response \(prompt, response\).*tokens"):
        list(read_conversations(path))
