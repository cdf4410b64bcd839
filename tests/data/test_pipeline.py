"""The pipeline truncates long examples, counts and rejects bad records, and cleans up after failed builds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from sft_recipe.config.schema import DataConfig
from sft_recipe.data import pipeline, store_writer, tokenize, worker_pool
from sft_recipe.data.notices import data_notices
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.errors import DataError, ModelError
from tests.data.stores import RECORDS, build, cache_contents, encoded, examples, write
from tests.support import tiny


def test_bad_record_late_in_a_file_leaves_no_folder(tokenizer, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 1)
    monkeypatch.setattr(worker_pool, "MIN_CHUNKS", 2)
    bad = write(tmp_path / "bad.json", [*RECORDS, {"prompt": "Hi", "response": ""}])
    with pytest.raises(DataError, match="bad.json, record 5.*response"):
        build(bad, tokenizer, cache_dir)
    assert cache_contents(cache_dir) == ["tokens"]


def test_interrupted_build_leaves_no_folder(data, tokenizer, cache_dir, monkeypatch):
    def stopped(*_):
        assert any("partial" in name for name in cache_contents(cache_dir))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_check_not_empty", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(data, tokenizer, cache_dir)
    assert cache_contents(cache_dir) == ["tokens"]
    monkeypatch.undo()
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)


@pytest.mark.parametrize("place", ["cache", "cache/tokens"])
def test_unwritable_cache_folder_is_a_data_error(place, data, tokenizer, cache_dir, tmp_path):
    in_the_way = tmp_path / place
    in_the_way.parent.mkdir(exist_ok=True)
    in_the_way.write_text("a file where a folder belongs")
    with pytest.raises(DataError, match=f"cannot be written to {cache_dir / 'tokens'}: .+"):
        build(data, tokenizer, cache_dir)


def test_full_disk_is_a_data_error(data, tokenizer, cache_dir, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_writer, "sync", full)
    with pytest.raises(DataError, match="cannot be written .*: No space left on device"):
        build(data, tokenizer, cache_dir)
    assert cache_contents(cache_dir) == ["tokens"]


def test_slow_tokenizer_is_refused_by_name(data, cache_dir):
    with pytest.raises(ModelError, match="ByT5Tokenizer .* use a fast tokenizer"):
        build(data, ByT5Tokenizer(), cache_dir)


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Lengths for a limit of 40: fits; too long in its response; fits; too long in its prompt already."""
    long = "USER: ASSISTANT: " * 30
    records = [RECORDS[0], {"prompt": "Hi", "response": long}, RECORDS[3], {"prompt": long, "response": "Hi"}]
    return write(tmp_path / "mixed.json", records)


def test_drop_leaves_out_long_examples(mixed, tokenizer, cache_dir):
    store = build(mixed, tokenizer, cache_dir, max_length=40)
    complete = encoded(tokenizer, mixed)
    assert examples(store) == [complete[0], complete[2]]
    report = store.report
    assert (report.records, report.examples, report.too_long, report.without_target) == (4, 2, 2, 0)
    assert report.longest == max(len(ids) for ids, _ in complete)
    assert report.tokens == len(complete[0][0]) + len(complete[2][0])


def test_right_truncates_and_drops_examples_without_target(mixed, tokenizer, cache_dir):
    store = build(mixed, tokenizer, cache_dir, max_length=40, truncation="right")
    complete = encoded(tokenizer, mixed)
    assert examples(store) == [complete[0], (complete[1][0][:40], complete[1][1][:40]), complete[2]]
    report = store.report
    assert (report.records, report.examples, report.too_long, report.without_target) == (4, 3, 2, 1)
    assert report.longest == max(len(ids) for ids, _ in complete)
    assert report.supervised == store.supervised.sum()


@pytest.mark.parametrize("max_length", range(5, 30))
def test_right_keeps_only_examples_with_supervised_tokens(max_length, mixed, tokenizer, cache_dir):
    targets = [mask[:max_length] for _, mask in encoded(tokenizer, mixed) if any(mask[:max_length])]
    if not targets:
        with pytest.raises(DataError):
            build(mixed, tokenizer, cache_dir, max_length=max_length, truncation="right")
        return
    store = build(mixed, tokenizer, cache_dir, max_length=max_length, truncation="right")
    assert [mask for _, mask in examples(store)] == targets
    assert store.supervised.min() > 0 and store.lengths.max() <= max_length
    assert store.report.without_target == 4 - len(targets)


def test_error_names_the_first_long_record(mixed, tokenizer, cache_dir):
    length = len(encoded(tokenizer, mixed)[1][0])
    with pytest.raises(DataError, match=f"mixed.json, record 2: {length} tokens.*max_length=40.*MAX_LENGTH"):
        build(mixed, tokenizer, cache_dir, max_length=40, truncation="error")
    assert cache_contents(cache_dir) == ["tokens"]


@pytest.mark.parametrize("truncation", ["drop", "right", "error"])
def test_example_of_exactly_max_length_is_kept(truncation, mixed, tokenizer, cache_dir):
    complete = encoded(tokenizer, mixed)
    longest = max(len(ids) for ids, _ in complete)
    store = build(mixed, tokenizer, cache_dir, max_length=longest, truncation=truncation)
    assert examples(store) == complete
    assert store.report.too_long == 0


@pytest.mark.parametrize("truncation", ["drop", "right"])
def test_error_says_what_to_set_if_all_examples_are_too_long(truncation, data, tokenizer, cache_dir):
    longest = max(len(ids) for ids, _ in encoded(tokenizer, data))
    with pytest.raises(DataError) as caught:
        build(data, tokenizer, cache_dir, max_length=4, truncation=truncation)
    message = str(caught.value)
    for part in (
        "data.json",
        "none of the 4 examples fits",
        "max_length=4 ",
        f"longest has {longest}",
        f"MAX_LENGTH to {longest}",
    ):
        assert part in message
    assert ("truncation=right" in message) == (truncation == "drop")
    assert cache_contents(cache_dir) == ["tokens"]
    assert len(build(data, tokenizer, cache_dir, max_length=longest)) == 4


def test_data_without_supervised_tokens_is_refused(data, tokenizer, cache_dir, monkeypatch):
    """No template does that by itself: the renderer refuses those that mark nothing."""
    encode_within = Renderer.encode_within

    def unmasked(renderer, conversations, limit):
        encoded = encode_within(renderer, conversations, limit)
        return [replace(item, loss_mask=[0] * len(item.loss_mask)) for item in encoded]

    monkeypatch.setattr(Renderer, "encode_within", unmasked)
    with pytest.raises(DataError, match="data.json: no token is supervised in any of the 4 records"):
        build(data, tokenizer, cache_dir)
    assert cache_contents(cache_dir) == ["tokens"]


BAD = [
    {"prompt": "Hi", "response": ""},
    {"prompt": "Hi", "response": 3},
    {"messages": [{"role": "robot", "content": "a"}]},
]


def test_bad_record_stops_the_build_and_others_are_listed(tokenizer, cache_dir, tmp_path):
    path = write(tmp_path / "a.json", [RECORDS[0], *BAD, *RECORDS])
    with pytest.raises(DataError) as caught:
        build(path, tokenizer, cache_dir)
    first, others, *lines, hint = str(caught.value).splitlines()
    assert "record 2: response is an empty response" in first and others == "2 other records cannot be used either:"
    assert "record 3: response is a number" in lines[0] and "record 4: messages[0].role is 'robot'" in lines[1]
    assert "data.on_bad_record=skip" in hint and len(lines) == 2


def test_at_most_twenty_other_bad_records_are_listed(tokenizer, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 8)
    with pytest.raises(DataError) as caught:
        build(write(tmp_path / "a.json", BAD * 30), tokenizer, cache_dir)
    lines = str(caught.value).splitlines()
    assert lines[1] == "More than 20 other records cannot be used either:" and len(lines) == 23


def test_look_ahead_after_a_bad_record_is_bounded(tokenizer, cache_dir, tmp_path, monkeypatch):
    """After 10,000 good records, here 8: an error need not wait for the end of a long file."""
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 4)
    monkeypatch.setattr(pipeline, "LOOK_AHEAD", 8)
    read = []
    admit = tokenize._admit
    monkeypatch.setattr(tokenize, "_admit", lambda *args: [read.append(args[0]), admit(*args)][1])
    with pytest.raises(DataError, match="record 1: "):
        build(write(tmp_path / "a.json", [BAD[0], *RECORDS * 10]), tokenizer, cache_dir)
    assert len(read) <= 16


def test_skipped_records_are_counted_by_kind_and_written(tokenizer, cache_dir, tmp_path):
    refusing = "{% if 'no' == messages[0]['content'] %}{{ raise_exception('never') }}{% endif %}" + tiny.CHATML
    tokenizer.chat_template = refusing
    path = write(tmp_path / "a.json", [*BAD, *RECORDS, {"prompt": "no", "response": "yes"}, BAD[0]])
    store = build(path, tokenizer, cache_dir, on_bad_record="skip")
    assert store.report.rejected == {"empty": 2, "type": 1, "roles": 1, "template": 1}
    assert store.report.rejected_kinds == "2 empty, 1 roles, 1 template, 1 type"
    assert (store.report.records, store.report.examples) == (9, 4)
    rows = [json.loads(line) for line in (store.folder / "rejected.jsonl").read_text().splitlines()]
    assert [row["record"] for row in rows[:3]] == BAD and rows[4]["record"] == BAD[0]
    assert rows[3]["record"]["messages"][0] == {"role": "user", "content": "no"}
    assert "never" in rows[3]["reason"] and "record 8" in rows[3]["reason"]
    assert examples(store) == encoded(tokenizer, write(tmp_path / "good.json", RECORDS))


def test_unreadable_rest_of_a_file_is_never_skipped(tokenizer, cache_dir, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS)[:-1])
    with pytest.raises(DataError, match="malformed JSON"):
        build(path, tokenizer, cache_dir, on_bad_record="skip")


def test_only_bad_records_is_an_error(tokenizer, cache_dir, tmp_path):
    with pytest.raises(DataError, match=r"none of the 3 records can be used \(1 empty, 1 roles, 1 type\)"):
        build(write(tmp_path / "a.json", BAD), tokenizer, cache_dir, on_bad_record="skip")


def test_unknown_column_stops_the_build(data, tokenizer, cache_dir):
    with pytest.raises(DataError, match="system='sys', but no record has such a column"):
        build(data, tokenizer, cache_dir, columns={"system": "sys"})


def test_examples_are_counted_per_file_and_have_digests(data, tokenizer, cache_dir, tmp_path):
    other = write(tmp_path / "b.json", [RECORDS[1], {"prompt": "1 2 3", "response": "4 5 6 " * 90}, RECORDS[1]])
    store = build([data, other], tokenizer, cache_dir, max_length=150)
    assert store.report.examples_of_files == [4, 2]
    groups = [ids for ids, _ in examples(store)]
    for one in range(6):
        for two in range(6):
            assert (store.digests[one] == store.digests[two]) == (groups[one] == groups[two])


def test_special_text_is_counted(tokenizer, cache_dir, tmp_path):
    records = [*RECORDS, {"prompt": "What is <|im_end|>?", "response": "A token."}]
    assert build(write(tmp_path / "a.json", records), tokenizer, cache_dir).report.special_text == 1


def test_reasoning_dropped_by_the_template_is_counted(cache_dir, tmp_path):
    forgetful = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    records = [*RECORDS, {"prompt": "Hi", "response": "<think>hm</think>Hello."}]
    store = build(write(tmp_path / "a.json", records), tiny.build_tokenizer(forgetful), cache_dir)
    assert (store.report.dropped_reasoning, store.report.examples) == (1, 5)


def test_a_notice_counts_the_answers_without_their_reasoning(cache_dir, tmp_path):
    drops_earlier = "{% for message in messages %}{{ message.role + ':' }}{{ message.reasoning_content if loop.last }}"
    drops_earlier += "{{ message.content + '<|im_end|>' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "reasoning_content": "hm"}]
    records = [{"messages": turn * 3}, {"messages": turn}, {"messages": turn * 2}]
    path = write(tmp_path / "a.json", records)
    report = build(path, tiny.build_tokenizer(drops_earlier), cache_dir).report
    assert (report.earlier_without_reasoning, report.dropped_reasoning) == (3, 0)
    [notice] = data_notices(report, "train", DataConfig(train_files=[str(path)]), tmp_path)
    assert notice.startswith("train: 3 answers trained without reasoning") and "data.split_turns=true" in notice
