"""Sweeps: Hydra's syntax, a folder and a row for each combination."""

import json

import pytest

from sft_recipe.cli.flags import parse
from sft_recipe.errors import ConfigError
from sft_recipe.launch.sweep import _results, fixed, points
from tests.support import tiny
from tests.support.runs import launch, metrics
from tests.support.small_run import arguments


def test_points_are_the_product_of_all_values():
    overrides = ["optim.lr=1e-5,2e-5", "trainer.seed=choice(1,2)", "data.max_length=64", "eval.prompts=[a,b]"]
    assert points(overrides) == [
        {"optim.lr": "1e-05", "trainer.seed": "1"},
        {"optim.lr": "1e-05", "trainer.seed": "2"},
        {"optim.lr": "2e-05", "trainer.seed": "1"},
        {"optim.lr": "2e-05", "trainer.seed": "2"},
    ]
    assert fixed(overrides) == ["data.max_length=64", "eval.prompts=[a,b]"]


def test_flags_may_have_several_values_in_a_sweep():
    words = ["--multirun", "--lr", "1e-5,2e-5", "--recipe", "small,minimind", "--train_data", "a.json,b.json"]
    overrides = parse(words, {}).overrides
    assert [list(point.values()) for point in points(overrides)] == [
        ["1e-05", "small"], ["1e-05", "minimind"], ["2e-05", "small"], ["2e-05", "minimind"],
    ]  # fmt: skip
    assert fixed(overrides) == ["data.train_files=[a.json,b.json]"]
    assert parse(words[1:3], {}).overrides == ["optim.lr='1e-5,2e-5'"]


@pytest.mark.parametrize("overrides", [["optim.lr=1e-5"], ["optim.lr=interval(0,1)"], ["optim.lr=1e-5,,"]])
def test_a_sweep_without_values_is_one_message(overrides):
    with pytest.raises(ConfigError, match=r"optim\.lr=1e-5,2e-5"):
        points(overrides)


def test_results_of_a_killed_run_do_not_need_its_last_row(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {}")
    assert _results(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/lo')
    assert _results(tmp_path) == {"train/loss": 2.5}


def test_bad_value_ends_the_sweep_before_its_first_run(tmp_path):
    model = tiny.build_model(tmp_path / "model")
    end = launch(*arguments(model, tmp_path), "--multirun", "optim.lr=1e-2,-1")
    assert end.returncode == 2 and "optim.lr" in end.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_combination_is_a_run(tmp_path):
    model = tiny.build_model(tmp_path / "model")
    end = launch(*arguments(model, tmp_path), "--multirun", "optim.lr=1e-2,1e-3", "trainer.total_epochs=1")
    assert end.returncode == 0, end.stdout + end.stderr
    runs = json.loads((tmp_path / "out/sweep.json").read_text())["runs"]
    assert [run["values"] for run in runs] == [{"optim.lr": "0.01"}, {"optim.lr": "0.001"}]
    for run in runs:
        rows = metrics(tmp_path / "out" / run["folder"])
        assert (run["exit_code"], run["train/loss"]) == (0, rows[-1]["train/loss"])
    assert runs[0]["val/loss"] < runs[1]["val/loss"]
    assert "<svg" in (tmp_path / "out/report.html").read_text()
