"""The statistics of the training data, against a count over the renderer's ids and masks."""

import json
import statistics

import numpy as np
import pytest
import yaml

from sft_recipe.data.statistics import data_statistics, end_token
from sft_recipe.data.token_store import Examples
from tests.data.stores import build, encoded, write
from tests.support import tiny
from tests.support.runs import run_here

RECORDS = [{"prompt": f"What is {n % 9}?", "response": "It is that. " * (1 + n % 9)} for n in range(12)]


def count(path, tokenizer, **options):
    store = build(path, tokenizer, path.parent / "cache", **options)
    ends = {tokenizer.eos_token_id}
    return data_statistics(Examples(store, np.arange(len(store))), options.get("truncation", "drop"), ends)


def test_examples_tokens_lengths_and_repetitions_are_counted(tokenizer, tmp_path):
    path = write(tmp_path / "data.json", RECORDS)
    expected, found = encoded(tokenizer, path), count(path, tokenizer)
    lengths = [len(ids) for ids, _ in expected]
    assert (found.examples, found.records, found.sampled) == (12, 12, 12)
    assert (found.tokens, found.supervised) == (sum(lengths), sum(sum(mask) for _, mask in expected))
    assert found.lengths["median"] == statistics.median_low(lengths) and found.lengths["max"] == max(lengths)
    assert (found.repeated, found.dropped, found.cut, found.without_end) == (3, 0, 0, 0)


@pytest.mark.parametrize(
    ("mask", "end"), [([0, 1, 1, 1], 9), ([0, 1, 1, 0], 9), ([0, 1, 0, 0], 7), ([0, 0, 0, 1], 4), ([0, 0, 1, 0], 9)]
)
def test_newline_with_a_loss_after_the_end_token_is_not_the_end(mask, end):
    """As in MiniMind's labels: 9 ends the turn, and 4 is the newline after it."""
    assert end_token(np.array([3, 7, 9, 4]), np.array(mask), {9}) == end


def test_cut_examples_have_no_end(tokenizer, tmp_path):
    path = write(tmp_path / "data.json", RECORDS)
    limit = 60
    whole = [ids for ids, _ in encoded(tokenizer, path)]
    too_long = sum(len(ids) > limit for ids in whole)
    lost = sum(tokenizer.eos_token_id not in ids[len(ids) // 2 : limit] for ids in whole)  # a cut line break is no loss
    assert 0 < lost < too_long < 12
    cut = count(path, tokenizer, max_length=limit, truncation="right")
    assert (cut.cut, cut.dropped, cut.without_end, cut.examples) == (too_long, 0, lost, 12)
    dropped = count(path, tokenizer, max_length=limit)
    assert (dropped.cut, dropped.dropped, dropped.without_end, dropped.examples) == (0, too_long, 0, 12 - too_long)


def test_large_data_is_sampled_evenly(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("sft_recipe.data.statistics.SAMPLE", 5)
    found = count(write(tmp_path / "data.json", RECORDS), tokenizer)
    assert (found.sampled, found.examples) == (5, 12)


def test_a_run_writes_them_beside_its_configuration(tmp_path):
    tiny.build_model(tmp_path / "model")
    path = write(tmp_path / "data.json", RECORDS)
    sizes = ["data.max_length=64", "data.truncation=right", "trainer.total_training_steps=1", "trainer.device=cpu"]
    places = [f"model.path={tmp_path}/model", f"data.cache_dir={tmp_path}/cache", f"trainer.output_dir={tmp_path}/out"]
    assert run_here(f"data.train_files={path}", *sizes, *places) == 0
    found = json.loads((tmp_path / "out/data.json").read_text())
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["data"]["truncation"] == "right"
    assert found["examples"] == 12 and found["cut"] >= found["without_end"] > 0 and found["format_version"]
