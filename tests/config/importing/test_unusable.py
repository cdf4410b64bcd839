"""Files with unusable, missing or hostile content are one message, or the setting is listed with a reason."""

import json

import pytest

from sft_recipe.cli import import_config as command
from sft_recipe.config.importing.parsing import MAX_DEPTH, MAX_VALUES, parse_json, parse_yaml
from sft_recipe.config.importing.source import import_config
from sft_recipe.errors import ConfigError
from tests.config.importing.test_import import AXOLOTL, INFO, LLAMA_FACTORY, write
from tests.support.runs import ROOT

TRL = {"model_name_or_path": "acme/base", "dataset_name": "acme/chats"}
NO_MODEL = "no model is named: the command would train the default model; add --model"
NO_DATA = "no training data is named: the command would train on the example data; add --train_data"
BOMB = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def unmapped(tmp_path, content):
    return import_config(write(tmp_path, content))[1].unmapped


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 20000, f"nested more than {MAX_DEPTH} levels"),
        ('{"a":' * 50000, f"nested more than {MAX_DEPTH} levels"),
        (f"base_model: {'[' * 150}{']' * 150}", f"nested more than {MAX_DEPTH} levels"),
        ("base_model: &a [*a]", f"nested more than {MAX_DEPTH} levels"),
        (f"{BOMB}model_name_or_path: *i\n", f"more than {MAX_VALUES:,} values"),
        ("base_model: a\nlora_r: 4\nlora_r: 8\n", "the key 'lora_r' occurs twice"),
        ('{"base_model": "a", "datasets": [{"path": "b", "path": "c"}]}', "the key 'path' occurs twice"),
        ("base_model: a\nseed: 2024-13-45\n", "not valid YAML (month must be in 1..12)"),
    ],
)
def test_a_file_that_cannot_be_processed_is_one_message(tmp_path, capsys, content, expected):
    path = write(tmp_path, content)
    assert command.main([str(path)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {path}") and expected in output.err and output.err.count("\n") == 1
    assert not output.out


def test_a_merged_key_may_be_set_again():
    assert parse_yaml("a: &a {k: 1, l: 2}\nb: {<<: *a, k: 3}\n")["b"] == {"k": 3, "l": 2}


def test_the_most_levels_and_values_are_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_yaml(text)) == json.dumps(parse_json(text)) == text
    assert len(parse_json(f"[{','.join('0' * MAX_VALUES)}]")) == MAX_VALUES
    with pytest.raises(ConfigError, match="values"):
        parse_json(f"[{','.join('0' * (MAX_VALUES + 1))}]")
    with pytest.raises(ConfigError, match="levels"):
        parse_json(f"[{text}]")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("[]", "dataset_info.json is not an object"),
        ("null", "dataset_info.json is not an object"),
        ("5", "dataset_info.json is not an object"),
        ("{", "dataset_info.json is not valid JSON"),
        ('{"faq": {}, "faq": {}}', "dataset_info.json: the key 'faq' occurs twice"),
        ('{"a":' * 50000, "dataset_info.json: lists or objects are nested"),
    ],
)
def test_an_unusable_dataset_info_is_one_message(tmp_path, info, expected):
    path = write(tmp_path, LLAMA_FACTORY)
    (tmp_path / "data/dataset_info.json").write_text(info)
    with pytest.raises(ConfigError) as caught:
        import_config(path)
    assert expected in str(caught.value)


def test_a_recipe_of_this_project_is_named(tmp_path, capsys):
    for recipe in sorted((ROOT / "conf/recipe").glob("*.yaml")):
        assert command.main([str(recipe)]) == 2
        assert f"{recipe} is a recipe of this project; use it as it is: ./train.sh --recipe {recipe}" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("given", "files", "expected"),
    [
        ({"path": "x.json", "type": "alpaca"}, "x.json", []),
        ("x.json", "x.json", []),
        (["x.json", {"path": None}], "x.json", ["datasets[1]: {'path': None}"]),
        (5, None, [NO_DATA, "datasets[0]: {'path': 5}"]),
        (
            [None, 5, {"path": None}, {"path": ["a"], "type": {"x": 1}}, {"type": "alpaca"}],
            None,
            [
                NO_DATA,
                "datasets[0]: {'path': None}",
                "datasets[1]: {'path': 5}",
                "datasets[2]: {'path': None}",
                "datasets[3]: {'path': ['a'], 'type': {'x': 1}}",
                "datasets[4]: {'type': 'alpaca'}",
            ],
        ),
        ({"path": "json", "data_files": [None]}, None, [NO_DATA, "datasets[0], data_files: [None]"]),
    ],
)
def test_the_data_sets_of_axolotl_are_named_or_listed(tmp_path, given, files, expected):
    path = write(tmp_path, {"base_model": "acme/base", "datasets": given, "warmup_steps": 10})
    _, result = import_config(path)
    assert result.values.get("data.train_files") == files
    lines = [line for line in result.unmapped if ", type: " not in line]
    assert [line.partition(" (its path")[0].partition(" (it is")[0] for line in lines] == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("base_model:\ndatasets: [x.json]\n", [NO_MODEL]),
        ({"base_model": "acme/base", "datasets": []}, [NO_DATA]),
        ({"base_model": None}, [NO_MODEL, NO_DATA]),
        ({"data": {"train_files": None}, "trainer": {"total_epochs": 1}}, [NO_MODEL, NO_DATA]),
        ({**LLAMA_FACTORY, "dataset": "elsewhere"}, [NO_DATA]),
        ({"model_name_or_path": "acme/base"}, [NO_DATA]),
        (TRL, []),
    ],
)
def test_a_missing_model_or_data_is_told_first(tmp_path, capsys, content, expected):
    path = write(tmp_path, content)
    assert command.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#   no ")] == [f"#   {line}" for line in expected]
    assert import_config(path)[1].unmapped[: len(expected)] == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "False"),
        ({"assistant_only_loss": None}, "False"),
        ({"assistant_only_loss": 1}, "1"),
        ({"assistant_only_loss": "yes"}, "yes"),
        ({"assistant_only_loss": True}, None),
    ],
)
def test_the_loss_of_trl_is_noted_as_given(tmp_path, settings, expected):
    lines = [line for line in unmapped(tmp_path, {**TRL, **settings}) if line.startswith("assistant_only_loss")]
    reason = "the loss is on the assistant's turns alone, as with true"
    assert lines == ([f"assistant_only_loss: {expected} ({reason})"] if expected else [])


@pytest.mark.parametrize(
    ("settings", "length", "truncation", "expected"),
    [
        ({}, 1024, "right", ""),
        ({"max_length": 512}, 512, "right", ""),
        ({"max_seq_length": 512}, 512, "right", ""),
        ({"max_length": None}, None, None, "max_length: null (nothing is cut; set data.max_length"),
        ({"max_length": "x"}, None, None, "max_length: x (data.max_length is 'x'"),
        ({"max_seq_length": "x"}, None, None, "max_seq_length: x (data.max_length is 'x'"),
    ],
)
def test_the_longest_example_of_trl(tmp_path, settings, length, truncation, expected):
    _, result = import_config(write(tmp_path, {**TRL, **settings}))
    assert (result.values.get("data.max_length"), result.values.get("data.truncation")) == (length, truncation)
    lines = [line for line in result.unmapped if "max_" in line]
    assert len(lines) == bool(expected) and "".join(lines).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected", "place"),
    [
        ({"num_samples": -3}, "dataset faq, num_samples: -3", "faq.json"),
        ({"num_samples": 0}, "dataset faq, num_samples: 0", "faq.json"),
        ({"num_samples": "x"}, "dataset faq, num_samples: x", "faq.json"),
        ({"num_samples": 3}, None, "faq.json#3"),
        ({"columns": 5}, "dataset faq, columns: 5 (it is not an object)", "faq.json"),
        ({"tags": [1]}, "dataset faq, tags: [1] (it is not an object)", "faq.json"),
        ({"file_name": 5}, "dataset faq: {'file_name': 5", None),
    ],
)
def test_an_entry_of_dataset_info(tmp_path, changes, expected, place):
    path = write(tmp_path, {"model_name_or_path": "acme/base", "stage": "sft", "dataset": "faq"})
    info = {"faq": {**INFO["faq"], **changes}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    _, result = import_config(path)
    assert result.values.get("data.train_files") == (place and f"{tmp_path}/data/{place}")
    lines = [line for line in result.unmapped if line.startswith("dataset")]
    assert len(lines) == bool(expected) and "".join(lines).startswith(expected or "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**LLAMA_FACTORY, "lora_rank": {"a": 1}}, "lora_rank: {'a': 1} (lora.rank is"),
        ({**LLAMA_FACTORY, "val_size": "x"}, "val_size: x ("),
        ({**LLAMA_FACTORY, "dataset": {"a": 1}}, "dataset: {'a': 1} (it is not a list of names)"),
        ({**LLAMA_FACTORY, "dataset": [["a"]]}, "dataset: [['a']] (it is not a list of names)"),
        ({**LLAMA_FACTORY, "adam_epsilon": "x"}, "adam_epsilon: x (it is not a number)"),
        ({**LLAMA_FACTORY, "optim": ["a"]}, "optim: ['a'] ("),
        ({**AXOLOTL, "plugins": 5}, "plugins: 5 (no counterpart)"),
        ({**TRL, "dataset_name": ["a"]}, "dataset_name: ['a'] (it is not a name)"),
    ],
)
def test_a_value_of_the_wrong_type_is_listed_with_its_key(tmp_path, content, expected):
    assert any(line.startswith(expected) for line in unmapped(tmp_path, content))


UNUSABLE = (None, "", "x", -1, 0.5, True, [], [None], [["a"]], {}, {"a": 1}, {"a": [None]})


@pytest.mark.parametrize("project", [LLAMA_FACTORY, AXOLOTL, TRL], ids=["llama_factory", "axolotl", "trl"])
def test_no_value_of_any_setting_ends_in_a_traceback(tmp_path, project):
    others = ("fsdp_config", "report_to", "plugins", "adam_epsilon", "max_steps", "max_length", "roles", "rl", "stage")
    for key in {*project, *others}:
        for value in UNUSABLE:
            try:
                import_config(write(tmp_path, {**project, key: value}))
            except ConfigError:
                continue


@pytest.mark.parametrize("project", [LLAMA_FACTORY, AXOLOTL], ids=["llama_factory", "axolotl"])
def test_no_value_of_a_data_set_ends_in_a_traceback(tmp_path, project):
    path = write(tmp_path, {**LLAMA_FACTORY, "dataset": "support"})
    entry = INFO["support"] if project is LLAMA_FACTORY else AXOLOTL["datasets"][0]
    for key in {*entry, "file_name", "data_files"}:
        for value in UNUSABLE:
            changed = {**entry, key: value}
            if project is AXOLOTL:
                write(tmp_path, {**AXOLOTL, "datasets": [changed]})
            else:
                (tmp_path / "data/dataset_info.json").write_text(json.dumps({"support": changed}))
            import_config(path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"roles_to_train": ["user"], "train_on_eos": "none"}, ["roles_to_train", "train_on_eos"]),
        ({"message_field_training": "learn", "drop_system_message": True}, ["message_field_training", "drop_system"]),
        ({"split_thinking": True, "shards": 10, "chat_template": "llama3"}, ["split_", "shards", "chat_template"]),
        ({"roles_to_train": ["assistant"], "train_on_eos": "turn", "ds_type": "json"}, []),
    ],
)
def test_every_setting_of_a_data_set_of_axolotl_is_read_or_listed(tmp_path, settings, expected):
    data = {"path": "x.json", "type": "chat_template", **settings}
    lines = unmapped(tmp_path, {"base_model": "acme/base", "datasets": [data], "warmup_steps": 10})
    assert len(lines) == len(expected)
    assert all(line.startswith(f"dataset x.json, {name}") for line, name in zip(lines, expected, strict=True))


def test_every_setting_of_dataset_info_is_read_or_listed(tmp_path):
    columns = {"prompt": "question", "kto_tag": "good"}
    info = {"hf_hub_url": "acme/chats", "ms_hub_url": "acme/chats", "folder": "en", "columns": columns}
    path = write(tmp_path, {**LLAMA_FACTORY, "dataset": "chats"})
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"chats": info}))
    assert [line for line in import_config(path)[1].unmapped if line.startswith("dataset ")] == [
        "dataset chats, folder: en (no counterpart)",
        "dataset chats, columns, kto_tag: good (no counterpart)",
    ]


@pytest.mark.parametrize(("value", "is_listed"), [(False, True), (True, False), (None, False)])
def test_a_loss_on_prompts_of_trl_is_listed(tmp_path, value, is_listed):
    lines = unmapped(tmp_path, {**TRL, "completion_only_loss": value})
    assert any(line.startswith("completion_only_loss: False (the loss is on") for line in lines) is is_listed
