"""The JSON schema accepts what the configuration accepts, so that editors complete and check config.yaml."""

import json
import re

import pytest
import yaml
from jsonschema import Draft202012Validator

from sft_recipe.config.json_schema import config_schema
from sft_recipe.config.schema import Config
from sft_recipe.config.validation import build_config, fields
from sft_recipe.errors import ConfigError
from tests.support.runs import ROOT

SCHEMA = json.loads((ROOT / "conf/config.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
FILES = sorted((ROOT / "conf").glob("*/*.yaml"))


def problems(tree):
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in VALIDATOR.iter_errors(tree)]


def test_the_written_schema_is_valid_and_that_of_the_keys():
    Draft202012Validator.check_schema(SCHEMA)
    assert config_schema() == SCHEMA


def test_config_yaml_names_the_schema_and_fits_it():
    text = (ROOT / "config.yaml").read_text()
    path = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", text.splitlines()[0])[1]
    assert (ROOT / path).samefile(ROOT / "conf/config.schema.json")
    assert problems(yaml.safe_load(text)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_of_conf_fits(path):
    values = yaml.safe_load(path.read_text())
    values.pop("defaults", None)
    assert problems(values if path.parent.name == "recipe" else {path.parent.name: values}) == []


def test_every_key_has_its_description_and_default():
    for key, info in fields():
        *groups, name = key.split(".")
        model = Config
        for group in groups:
            model = model.model_fields[group].annotation
        found = SCHEMA["$defs"][model.__name__]["properties"][name]
        assert found["description"] == info.description and "default" in found


@pytest.mark.parametrize(
    ("tree", "is_valid"),
    [
        ({"optim": {"lr": 1e-5}}, True),
        ({"optim": {"lr": "${if_else:${lora.enabled},2.0e-4,2.0e-5}"}}, True),
        ({"optim": {"lr": -1.0}}, False),
        ({"optim": {"lr": "fast"}}, False),
        ({"optim": {"learning_rate": 1e-5}}, False),
        ({"data": {"truncation": "left"}}, False),
        ({"data": {"roles": {"Agent": "assistant"}}}, True),
        ({"data": {"roles": {"Agent": "robot"}}}, False),
        ({"data": {"train_files": ["a.json", "b.json"]}}, True),
        ({"trainer": {"early_stopping": {"mode": "min"}}}, True),
        ({"trainer": {"early_stopping": {"mode": "least"}}}, False),
        ({"datas": {}}, False),
    ],
)
def test_the_schema_judges_as_the_configuration_does(tree, is_valid):
    assert (problems(tree) == []) == is_valid
    if "${" in str(tree):
        return
    groups = {"model": {}, "data": {}, "optim": {}, "fsdp": {}, "lora": {}}
    if is_valid:
        build_config({**groups, **tree})
    else:
        with pytest.raises(ConfigError):
            build_config({**groups, **tree})
