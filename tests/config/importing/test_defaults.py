"""What another project does where a file leaves a setting out is kept, or listed where it differs here."""

import pytest

from tests.config.importing.test_import import AXOLOTL, LLAMA_FACTORY, VERL, imported


def test_axolotl_warms_up_for_3_percent_where_a_file_says_nothing(tmp_path):
    without = {name: value for name, value in AXOLOTL.items() if name != "warmup_steps"}
    _, values, unmapped = imported(tmp_path, without)
    assert values["optim.lr_warmup_steps_ratio"] == 0.03 and "warmup_steps" in unmapped  # there it has a limit
    _, values, unmapped = imported(tmp_path, {**without, "warmup_ratio": 0.2})
    assert values["optim.lr_warmup_steps_ratio"] == 0.2 and "warmup_steps" not in unmapped


@pytest.mark.parametrize(
    "content",
    [
        {"model_name_or_path": "acme/base", "dataset_name": "acme/chats", "use_peft": True},
        {key: value for key, value in AXOLOTL.items() if key != "lora_target_linear"},
    ],
    ids=["trl", "axolotl"],
)
def test_modules_that_peft_would_choose_by_the_type_of_the_model_are_listed(tmp_path, content):
    _, values, unmapped = imported(tmp_path, content)
    assert values["lora.enabled"] and "lora.target_modules" not in values and "lora_target_modules" in unmapped
    _, values, unmapped = imported(tmp_path, {**content, "lora_target_modules": ["q_proj"]})
    assert values["lora.target_modules"] == ["q_proj"] and "lora_target_modules" not in unmapped


def test_verl_resumes_by_itself(tmp_path):
    for mode, expected in (("auto", "auto"), ("disable", None)):
        _, values, unmapped = imported(tmp_path, VERL.rstrip("\n") + f" trainer.resume_mode={mode}\n", "a.sh")
        assert values.get("trainer.resume_from") == expected and ("trainer.resume_mode" in unmapped) == (
            mode == "disable"
        )


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (AXOLOTL, ["num_epochs", "warmup_ratio", "weight_decay", "lr_scheduler"]),
        (LLAMA_FACTORY, ["num_train_epochs", "warmup_ratio", "learning_rate", "cutoff_len"]),
        (
            {"model_name_or_path": "acme/base", "dataset_name": "acme/chats", "use_peft": True},
            ["learning_rate", "warmup_ratio", "lora_r"],
        ),
    ],
    ids=["axolotl", "llama_factory", "trl"],
)
def test_a_blank_setting_has_the_default_of_its_project(tmp_path, content, names):
    content = {name: value for name, value in content.items() if name not in (*names, "warmup_steps")}
    expected = imported(tmp_path, content)
    assert imported(tmp_path, content | dict.fromkeys(names)) == expected
    assert {"trainer.total_epochs", "optim.lr_warmup_steps_ratio"} <= expected[1].keys()
