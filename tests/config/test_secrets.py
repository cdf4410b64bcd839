"""Secrets of the environment are written as references; other variables and equal text are left alone."""

import pytest

from sft_recipe.config.compose import load_config, to_yaml
from sft_recipe.config.secrets import without_secrets

VALUE = "hf_0123456789abcdef"
SECRETS = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_APIKEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "PGPASSWORD",
    "db_password_2",
    "CLIENT_SECRETS",
    "SSH_PRIVATE_KEY",
]
OTHERS = [
    "TOKENIZER_PATH",
    "TOKENIZERS_PARALLELISM",
    "TOKENIZER",
    "HF_TOKEN_PATH",
    "API_KEY_FILE",
    "SECRETARY",
    "HOME2",
]


@pytest.mark.parametrize("name", SECRETS)
def test_value_of_a_secret_variable_becomes_a_reference(monkeypatch, name):
    monkeypatch.setenv(name, VALUE)
    tree = {"a": [f"https://user:{VALUE}@host", 3, None], "b": {"c": VALUE}}
    reference = f"${{oc.env:{name}}}"
    assert without_secrets(tree) == {"a": [f"https://user:{reference}@host", 3, None], "b": {"c": reference}}


@pytest.mark.parametrize("name", OTHERS)
def test_value_of_another_variable_stays(monkeypatch, name):
    monkeypatch.setenv(name, VALUE)
    assert without_secrets({"a": f"/models/{VALUE}"}) == {"a": f"/models/{VALUE}"}


def test_tokenizer_path_is_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path))
    config = load_config([f"model.path={tmp_path}", f"model.tokenizer_path={tmp_path}"])
    assert f"path: {tmp_path}\n" in to_yaml(config) and "oc.env" not in to_yaml(config)


def test_nothing_is_left_of_a_secret_that_contains_another(monkeypatch):
    monkeypatch.setenv("A_TOKEN", VALUE)
    monkeypatch.setenv("B_TOKEN", f"{VALUE}-more")
    monkeypatch.setenv("C_TOKEN", "oc.env:A_TOKEN")
    assert without_secrets([f"{VALUE}-more", VALUE]) == ["${oc.env:B_TOKEN}", "${oc.env:A_TOKEN}"]


def test_saved_configuration_has_references_that_resolve_to_the_same_values(monkeypatch, compose_own):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    config = load_config([f"model.override_config={{key: {VALUE}}}"])
    assert VALUE not in to_yaml(config)
    assert compose_own(to_yaml(config), defaults="") == config
