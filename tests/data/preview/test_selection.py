"""Which conversations a preview shows, how a step is packed, and the same statistics on several cores."""

import json

import pytest

from sft_recipe.cli.preview import main
from sft_recipe.data.batching import batch_indices
from sft_recipe.data.pretokenized import TokenizedRecord
from sft_recipe.data.preview.selection import SORTS, Selection
from sft_recipe.data.preview.stats import DatasetStats, Settings
from sft_recipe.data.preview.step import step_lines
from sft_recipe.errors import ConfigError
from tests.data.preview.examples import conversation, stats_of_masks

TALKS = [conversation(f"Question {n}", "Yes. " * (n * 7 % 11 + 1), source=f"a.json, record {n}") for n in range(1, 11)]


def shown(renderer, count=3, **selection):
    stats = DatasetStats(Settings(), count, Selection(**selection))
    stats.read(TALKS, renderer)
    return stats, [int(example.record.source.rpartition(" ")[2]) for example in stats.sample]


@pytest.mark.parametrize("sort", SORTS)
def test_sorted_by_length_or_supervised_tokens(renderer, sort):
    encoded = {n: renderer.encode(talk) for n, talk in enumerate(TALKS, 1)}
    size = {
        "longest": lambda n: -len(encoded[n].input_ids),
        "shortest": lambda n: len(encoded[n].input_ids),
        "least_supervised": lambda n: sum(encoded[n].loss_mask),
    }[sort]
    assert shown(renderer, sort=sort)[1] == sorted(encoded, key=lambda n: (size(n), n))[:3]


def test_found_by_text_in_capitals_or_not(renderer):
    stats, numbers = shown(renderer, find="qUESTION 1")
    assert numbers == [1, 10] and stats.found == 2 and stats.records == 10
    assert shown(renderer, find="nothing")[1] == []
    assert shown(renderer, count=1, find="question 1", sort="longest")[1] == [1]


def test_found_in_the_text_of_token_ids(renderer):
    ids = renderer.tokenizer("Some Question", add_special_tokens=False).input_ids
    record, decode = TokenizedRecord(ids, [1] * len(ids)), renderer.tokenizer.decode
    assert Selection("qUESTION", decode=decode).finds(record) and not Selection("other", decode=decode).finds(record)


def test_without_a_selection_the_sample_is_as_before(renderer):
    assert shown(renderer, count=10)[1] == list(range(1, 11))
    assert set(shown(renderer, find="question")[1]) == set(shown(renderer)[1])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_names_the_examples_of_training(step):
    masks = ["0" * n + "1" for n in (3, 8, 2, 5, 9, 4, 1)]
    stats = stats_of_masks(*masks, max_length=8, batch_size=2, token_budget=8, ranks=1, seed=3)
    kept = [n for n, mask in enumerate(masks) if len(mask) <= 8]  # others are left out
    expected = [kept[index] for index in batch_indices(step - 1, len(kept), 2, 3, "shuffle")]
    first, *lines = step_lines(stats, step)
    found = [int(line.rpartition(" ")[2]) - 1 for line in lines if "record" in line]
    assert sorted(found) == sorted(expected)
    assert f"{sum(len(masks[n]) for n in expected)} tokens" in first
    budgets = [line for line in lines if "of at most 8 tokens" in line]
    assert f"in {len(budgets)} micro-batch" in first and all(line.startswith("  rank 0") for line in budgets)


def test_a_step_after_the_epoch_is_an_error():
    with pytest.raises(ConfigError, match="--step is 9, but an epoch has 1 step"):
        list(step_lines(stats_of_masks("01", "001", batch_size=2), 9))


@pytest.fixture
def files(tmp_path):
    """Two files; the first one alone is too short for several processes."""
    paths = []
    for name, count in (("a", 3), ("b", 40)):
        paths.append(tmp_path / f"{name}.json")
        records = [{"prompt": f"{name} {n}?", "response": "Yes. " * (n % 9 + 1)} for n in range(count)]
        paths[-1].write_text(json.dumps([*records, {"prompt": "x", "response": 5}]))
    return [str(path) for path in paths]


def test_several_processes_show_what_one_shows(files, model_dir, pools, monkeypatch, capsys):
    monkeypatch.setattr("sft_recipe.data.preview.stats.CHUNK", 8)
    outputs = []
    for workers in (1, 2):
        arguments = ["--train_data", f"{files[0]}*0.5", files[1], "--model", str(model_dir), "--step", "1"]
        assert main([*arguments, f"data.num_workers={workers}", "data.on_bad_record=skip"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "2 of 3 from" in outputs[0] and "2 records rejected" in outputs[0]
    assert pools == [2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sort", "size"], "invalid choice: 'size'"),
        (["--step", "0"], "0 is not the number of a step"),
        (["--step", "99"], "--step is 99, but an epoch has"),
        (["--find"], "--find needs a value"),
    ],
)
def test_wrong_arguments_are_one_message(files, model_dir, capsys, arguments, expected):
    base = ["--train_data", files[0], "--model", str(model_dir), "data.on_bad_record=skip"]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error
