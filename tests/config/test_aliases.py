"""Older names of keys, which were renamed or come from verl's older layout, set the present keys."""

import re

import pytest
from omegaconf import OmegaConf

from sft_recipe.config.aliases import OLDER_GROUPS, OLDER_KEYS
from sft_recipe.config.compose import load_config
from sft_recipe.errors import ConfigError
from tests.support.composing import error_of

ACTOR = "actor_rollout_ref.actor"


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


# The older long paths


@pytest.mark.parametrize(
    ("older", "key", "value"),
    [
        (f"{ACTOR}.fsdp_config", "fsdp.param_offload", True),
        (f"{ACTOR}.fsdp_config", "fsdp.optimizer_offload", True),
        (f"{ACTOR}.fsdp_config", "fsdp.strategy", "fsdp2"),
        (f"{ACTOR}.fsdp_config", "fsdp.mixed_precision.param_dtype", "bf16"),
        (f"{ACTOR}.optim", "optim.lr", 0.5),
        (f"{ACTOR}.optim", "optim.lr_warmup_steps_ratio", 0.5),
        (f"{ACTOR}.optim", "optim.betas", [0.5, 0.6]),
    ],
)
def test_older_long_path_sets_the_key(compose_own, older, key, value):
    short = load_config([f"{key}={value}"])
    assert short != load_config([])
    long = f"{older}.{key.split('.', 1)[1]}"
    assert load_config([f"{long}={value}"]) == short
    assert load_config([f"++{long}={value}"]) == short
    assert compose_own(nested(long, value)) == short


def test_older_paths_have_the_same_precedence(compose_own):
    body = nested(f"{ACTOR}.optim.lr", 0.5)
    assert compose_own(body, "optim.lr=0.25").optim.lr == 0.25
    assert compose_own({"optim": {"lr": 0.5}}, f"{ACTOR}.optim.lr=0.25").optim.lr == 0.25
    assert compose_own(body, "optim=linear").optim.lr == 0.5
    assert load_config([f"{ACTOR}.optim.lr=0.5", "optim.lr=0.25"]).optim.lr == 0.25


@pytest.mark.parametrize(("older", "name"), OLDER_GROUPS.items())
def test_both_names_of_a_group_can_set_different_keys(compose_own, older, name):
    first, second = {"fsdp": ("param_offload", "optimizer_offload"), "optim": ("weight_decay", "lr")}[name]
    config = getattr(compose_own({name: {first: 1}, **nested(f"{older}.{second}", 1)}), name)
    assert getattr(config, first) and getattr(config, second) == 1


def test_nested_groups_of_both_names_are_merged(compose_own):
    body = {"fsdp": {"mixed_precision": {"param_dtype": "bf16"}}}
    body |= nested(f"{ACTOR}.fsdp_config.mixed_precision.reduce_dtype", "bf16")
    precision = compose_own(body).fsdp.mixed_precision
    assert (precision.param_dtype, precision.reduce_dtype) == ("bf16", "bf16")


@pytest.mark.parametrize(
    ("older", "name", "key", "value", "other"),
    [
        (f"{ACTOR}.optim", "optim", "lr", 0.5, 0.25),
        (f"{ACTOR}.fsdp_config", "fsdp", "mixed_precision.reduce_dtype", "bf16", "fp32"),
    ],
)
def test_different_values_under_both_names_are_an_error(compose_own, older, name, key, value, other):
    with pytest.raises(ConfigError) as caught:
        compose_own({**nested(f"{name}.{key}", value), **nested(f"{older}.{key}", other)})
    assert f"{name}.{key} to {value} and {older}.{key} to {other}" in str(caught.value)


def test_same_value_under_both_names_is_accepted(compose_own):
    assert compose_own({"optim": {"lr": 0.5}, **nested(f"{ACTOR}.optim.lr", 0.5)}).optim.lr == 0.5


@pytest.mark.parametrize(
    "body",
    [
        nested("actor_rollout_ref.rollout.n", 1),
        nested(f"{ACTOR}.ppo_epochs", 1),
        nested(f"{ACTOR}.optim", 3),
        nested("actor_rollout_ref.actor", None),
        {"actor_rollout_ref": 3},
        nested(f"{ACTOR}", {"optim": {"lr": 0.5}, "ppo_epochs": 1}),
    ],
)
def test_other_keys_of_the_older_layout_are_errors(compose_own, body):
    with pytest.raises(ConfigError, match="actor_rollout_ref is not a key"):
        compose_own(body)


@pytest.mark.parametrize(
    ("override", "expected_text"),
    [
        (f"{ACTOR}.optim.lrr=1", "unknown key optim.lrr. Did you mean optim.lr?"),
        (f"{ACTOR}.ppo_epochs=1", f"unknown key {ACTOR}.ppo_epochs"),
        ("actor_rollout_ref.model.path=x", "Did you mean model.path?"),
        (f"{ACTOR}.optim=linear", "unknown key"),
        (f"~{ACTOR}.optim.lr", "deleting a key"),
    ],
)
def test_unknown_older_path_is_an_error(override, expected_text):
    assert re.search(re.escape(expected_text), error_of([override]))


# Renamed keys


RENAMED = [
    ("data.allow_special_text", "data.parse_special_tokens", True),
    ("data.shuffle", "data.order", False),
    ("trainer.hang_timeout", "trainer.heartbeat_timeout", 7),
    ("trainer.experiment_name", "trainer.run_name", "try-1"),
]


def test_every_renamed_key_is_tested():
    assert {older: key for older, key, _ in RENAMED} == OLDER_KEYS


@pytest.mark.parametrize(("older", "key", "value"), RENAMED)
def test_older_name_sets_the_key(compose_own, tmp_path, older, key, value):
    expected = load_config([f"{key}={value}"])
    assert expected != load_config([])
    assert load_config([f"{older}={value}"]) == load_config([f"++{older}={value}"]) == expected
    assert compose_own(nested(older, value)) == expected
    group, _, leaf = older.partition(".")
    if group != "trainer":  # the only group without files of choices
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(f"defaults: [default]\n{leaf}: {str(value).lower()}\n")
        assert compose_own("", f"{group}=mine") == expected


@pytest.mark.parametrize(("older", "key", "value"), RENAMED)
def test_later_override_wins_under_either_name(compose_own, older, key, value):
    default = load_config([])
    value_before = OmegaConf.select(OmegaConf.create(default.public()), key)
    restored = f"{key}={'null' if value_before is None else value_before}"
    assert load_config([f"{older}={value}", restored]) == default
    assert compose_own(nested(older, value), restored) == default


def test_different_values_under_both_names_of_a_key_are_an_error(compose_own):
    with pytest.raises(ConfigError, match="trainer.heartbeat_timeout to 5 and trainer.hang_timeout to 7"):
        compose_own({"trainer": {"hang_timeout": 7, "heartbeat_timeout": 5}})


def test_shuffle_is_an_order(compose_own):
    assert load_config(["data.shuffle=false"]).data.order == "file"
    assert load_config(["data.order=file", "data.shuffle=true"]).data.order == "shuffle"
    assert "data.order" in error_of(["data.shuffle=no"]) and "shuffle" in error_of(["data.order=random"])


def test_null_under_the_older_name_is_null(compose_own):
    assert compose_own({"trainer": {"hang_timeout": None}}).trainer.heartbeat_timeout is None


def test_either_is_an_alias_of_if_else(compose_own, capsys):
    assert compose_own("optim: {lr: '${either:${lora.enabled},0.5,0.25}'}\n", "lora.enabled=true").optim.lr == 0.5
    assert "use ${if_else:...}" in capsys.readouterr().err


# Notices


@pytest.mark.parametrize(("older", "name"), [*OLDER_GROUPS.items(), *OLDER_KEYS.items()])
def test_older_name_prints_one_notice_with_the_present_name(compose_own, capsys, older, name):
    key, value = ("lr", 0.5) if name == "optim" else ("param_offload", True)
    values = {key: value for key, _, value in RENAMED}
    path, value = (f"{older}.{key}", value) if older in OLDER_GROUPS else (older, values[older])
    expected = f"notice: {older} is the older name of {name}; it still works, but use {name}\n"
    load_config([f"{path}={value}"])
    assert capsys.readouterr().err == expected
    compose_own(nested(path, value))
    assert capsys.readouterr().err == expected
    load_config([])
    assert capsys.readouterr().err == ""


def test_older_name_in_conf_prints_a_notice(compose_own, capsys, tmp_path):
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/mine.yaml").write_text("defaults: [default]\nallow_special_text: true\n")
    compose_own("", "data=mine")
    assert "use data.parse_special_tokens" in capsys.readouterr().err


def test_only_one_rank_of_a_machine_prints_a_notice(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    load_config(["trainer.hang_timeout=7"])
    assert capsys.readouterr().err == ""
