"""A data path that exists is one path, whatever its name looks like."""

import pytest

from sft_recipe.cli.flags import parse
from sft_recipe.config.compose import load_config, parse_config_args


def resolved(*words, **environment):
    line = parse(list(words), environment)
    return load_config(line.overrides, **parse_config_args(line.config_args))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train_data", "a,b.json"], "a,b.json"),
        (["--train_data", "a,b.json*0.5", "c.json,d.json"], ["a,b.json*0.5", "c.json", "d.json"]),
        (["--train_data", "a,b.json#7", "lr=1.json", "--epochs", "1"], ["a,b.json#7", "lr=1.json"]),
        (["--train-data", "c.json", "lr=1.json*2", "optim.lr=1e-5"], ["c.json", "lr=1.json*2"]),
        (["--train_data=lr=1.json"], "lr=1.json"),
        (["--train_data", "~/a,b.json"], "~/a,b.json"),
    ],
)
def test_path_that_exists_is_one_path(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a,b.json", "lr=1.json"):
        (tmp_path / name).touch()
    assert resolved(*words).data.train_files == expected
    if len(words) == 2:
        assert resolved(TRAIN_DATA=words[1]).data.train_files == expected


def test_override_that_is_also_a_path_stays_an_override_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optim.lr=1e-5").touch()
    config = resolved("--train_data", "a.json", "--epochs", "1", "optim.lr=1e-5")
    assert (config.optim.lr, config.data.train_files) == (1e-5, "a.json")
