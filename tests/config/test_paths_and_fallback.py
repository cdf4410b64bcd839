"""Data paths are resolved beside config.yaml, and only the default model has a fallback."""

from pathlib import Path

import pytest

from sft_recipe.config.compose import load_config
from tests.support.composing import DEFAULT_MODEL, DEFAULTS, FALLBACK

# Data paths


def test_relative_data_path_is_resolved_here_or_beside_config_yaml(compose_own, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("beside.json", "both.json", "odd[1].json"):
        (tmp_path / name).touch()
    (here / "both.json").touch()

    def data_of(*paths):
        return compose_own({"data": {"train_files": list(paths), "val_files": paths[0]}}).data

    data = data_of("beside.json", "both.json", "nowhere.json", "/abs.json", "bes*.json", "odd[1].json", "https://x/y")
    assert data.train_files == [
        f"{tmp_path}/beside.json",
        "both.json",
        "nowhere.json",
        "/abs.json",
        f"{tmp_path}/bes*.json",
        f"{tmp_path}/odd[1].json",
        "https://x/y",
    ]
    assert data.val_files == f"{tmp_path}/beside.json"


def test_example_data_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(str(load_config([]).data.train_files)).is_file()


@pytest.mark.parametrize("path", [".", "''", "'**a'", "'[a'", "a" * 300, "'~/x'"])
def test_invalid_data_path_is_passed_to_the_reader(path):
    assert load_config([f"data.train_files={path}"]).data.train_files == path.strip("'")


# The model


def test_default_model_has_a_fallback(compose_own):
    assert load_config([]).model.fallback == FALLBACK
    assert compose_own("model: {trust_remote_code: true}\n").model.fallback == FALLBACK
    assert load_config(["model.tokenizer_path=x"]).model.fallback == FALLBACK


@pytest.mark.parametrize(
    "override",
    [f"model.path={DEFAULT_MODEL}", "model.path=x", "++model.path=x", "model=qwen2.5-0.5b", "model={path: x}"],
)
def test_model_named_on_the_command_line_has_no_fallback(override):
    assert load_config([override]).model.fallback is None


@pytest.mark.parametrize(
    ("defaults", "body"),
    [
        (DEFAULTS, f"model: {{path: {DEFAULT_MODEL}}}\n"),
        (DEFAULTS, "model: {path: '/models/${optim.lr_scheduler_type}'}\n"),
        (DEFAULTS.replace("model: default", "model: qwen2.5-0.5b"), ""),
    ],
)
def test_model_named_in_config_yaml_has_no_fallback(compose_own, defaults, body):
    assert compose_own(body, defaults=defaults).model.fallback is None


def test_named_fallback_is_kept(compose_own):
    assert load_config(["model.path=x", "model.fallback=y"]).model.fallback == "y"
    assert compose_own("model: {path: x, fallback: y}\n").model.fallback == "y"
