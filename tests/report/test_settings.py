"""What differs from the defaults, and the command that repeats a run: it composes the same configuration again."""

import json
import shlex

import pytest
import yaml

from sft_recipe.cli.train import parse_arguments
from sft_recipe.config.compose import load_config, parse_config_args, to_yaml
from sft_recipe.report.run import Run
from sft_recipe.report.settings import command, compare_settings, differences


def run_of(folder, *overrides: str) -> Run:
    """Return a run that was configured so; its folder has the config.yaml that training writes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load_config([*overrides, f"trainer.output_dir={folder}"])))
    return Run(folder, [{"step": 1}], yaml.safe_load((folder / "config.yaml").read_text()), [])


def test_a_run_with_the_defaults_differs_only_in_its_folder(tmp_path):
    assert set(differences(run_of(tmp_path))) == {"trainer.output_dir"}


def test_differences_have_value_and_default(tmp_path):
    found = differences(run_of(tmp_path, "optim.lr=1e-5", "fsdp.mixed_precision.param_dtype=fp32"))
    assert found["optim.lr"] == (1e-5, 2e-5)
    assert found["fsdp.mixed_precision.param_dtype"] == ("fp32", "auto")


def test_the_default_of_the_learning_rate_is_that_of_lora_with_lora(tmp_path):
    assert "optim.lr" not in differences(run_of(tmp_path, "lora.enabled=true"))
    assert differences(run_of(tmp_path, "lora.enabled=true", "optim.lr=2e-5"))["optim.lr"] == (2e-5, 2e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "lora.enabled=true",
            "lora.target_modules=[q_proj,v_proj]",
            "trainer.early_stopping.patience=2",
            "data.val_ratio=0.1",
        ],
        ["'data.train_files=/data/with space, comma.json'", "optim.clip_grad=null"],
        ["model.path='true'", "trainer.experiment_name='12'", "trainer.project_name='null'"],
        ["data.columns={prompt: question}", "model.override_config={attention_dropout: 0.1}"],
        ["data.columns={prompt: 'the: question', a b: '{response}'}"],
        ["eval.prompts=['Say \"hi\"; $HOME `x`', \"it's\", '\\${oc.env:HOME}', '', '你好？']"],
        ["model.path=C:\\\\models\\\\x", "trainer.project_name='a=b'"],
    ],
)
def test_the_command_composes_the_same_configuration(tmp_path, overrides):
    overrides = [text.strip("'") if text.startswith("'data") else text for text in overrides]
    if "space" in overrides[0]:
        overrides[0] = "data.train_files='/data/with space, comma.json'"
    run = run_of(tmp_path / "run", *overrides)
    words = shlex.split(command(run))
    assert words[0] == "./train.sh"
    line = parse_arguments(words[1:])
    again = load_config(line.overrides, **parse_config_args(line.config_args)).model_dump(mode="json")
    assert again.pop("trainer") | {"output_dir": ""} == load_config(overrides).model_dump(mode="json").pop(
        "trainer"
    ) | {"output_dir": ""}
    expected = load_config(overrides).model_dump(mode="json")
    del expected["trainer"]
    assert again == expected
    assert f"{tmp_path}/run-again" in words[-1]


def test_a_value_that_no_command_line_can_have_is_read_from_the_run(tmp_path):
    """Hydra has no quotes for keys."""
    run = run_of(tmp_path)
    run.config["data"]["columns"] = {"prompt": "a: b", "it's, or not": "response"}
    assert shlex.split(command(run)) == [
        "./train.sh",
        f"--config-path={tmp_path}",
        f"trainer.output_dir={tmp_path}-again",
    ]


def test_runs_are_compared_by_the_settings_that_are_not_equal(tmp_path):
    runs = [run_of(tmp_path / "a", "optim.lr=1e-5"), run_of(tmp_path / "b", "optim.lr=2e-5", "trainer.seed=1")]
    assert compare_settings(runs) == {"optim.lr": [1e-5, 2e-5], "trainer.seed": [42, 1]}
    del runs[0].config["trainer"]["seed"], runs[0].config["eval"]  # of an older version, without these keys
    assert compare_settings(runs) == {"optim.lr": [1e-5, 2e-5], "trainer.seed": [42, 1]}


def test_the_command_names_the_model_that_was_trained_instead(tmp_path):
    run = run_of(tmp_path)
    assert "model.path" not in command(run)
    (tmp_path / "run.json").write_text(json.dumps({"model": run.setting("model.fallback")}))
    assert f"model.path={run.setting('model.fallback')}" in command(run)
