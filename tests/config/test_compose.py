"""config.yaml, conf/ and overrides become one checked configuration; whatever cannot be used is told."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sft_recipe.config import compose
from sft_recipe.config.compose import GROUPS, HOME, OLDER_GROUPS, OLDER_KEYS, load_config, parse_config_args, to_yaml
from sft_recipe.errors import ConfigError

DEFAULTS = "defaults:\n" + "".join(f"  - {group}: default\n" for group in GROUPS) + "  - _self_\n"
CHOICES = sorted((path.parent.name, path.stem) for path in HOME.glob("conf/*/*.yaml"))
DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B"
FALLBACK = "SmolLM2-135M-Instruct"
ACTOR = "actor_rollout_ref.actor"
READ, REMEMBERED = compose._compose, {}  # type: ignore[var-annotated]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """Relative data paths stay as they are. Hydra reads the recipe's own files once for each set of choices."""
    monkeypatch.chdir(HOME)
    monkeypatch.setattr(compose, "_compose", compose_remembered)


def compose_remembered(root, written, choices, config_dir):
    if root.parent != HOME:
        return READ(root, written, choices, config_dir)
    key = tuple(item.input_line for item in choices)
    if key not in REMEMBERED:
        REMEMBERED[key] = READ(root, written, choices, config_dir)
    return copy.deepcopy(REMEMBERED[key])


@pytest.fixture
def own(tmp_path):
    """Composes a config.yaml in a folder of its own, which has no conf/."""

    def load(body, *overrides, defaults=DEFAULTS, folder=tmp_path):
        (folder / "config.yaml").write_text(defaults + (body if isinstance(body, str) else yaml.safe_dump(body)))
        return load_config(list(overrides), folder)

    return load


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def error_of(*args):
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    return str(caught.value)


# Groups


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_ready_choice_composes_to_what_its_file_says(group, choice):
    config = load_config([f"{group}={choice}"]).model_dump(mode="json")
    said = yaml.safe_load((HOME / "conf" / group / f"{choice}.yaml").read_text())
    said.pop("defaults", None)
    if group == "model":
        said["fallback"] = None
    said = {key: value for key, value in said.items() if "${" not in str(value)}
    assert {key: config[group][key] for key in said} == said


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], 2e-5),
        (["lora.enabled=true"], 2e-4),
        (["lora=r16", "optim=linear"], 2e-4),
        (["lora=r16", "optim.lr=2e-5"], 2e-5),
        (["optim.lr=3e-6"], 3e-6),
    ],
)
def test_lora_starts_from_ten_times_the_rate_unless_one_is_named(overrides, rate):
    assert load_config(overrides).optim.lr == rate


def test_choices_of_different_groups_go_together():
    config = load_config(["lora=r16", "fsdp=fsdp2_offload", "optim=constant", "data=long", "model=smollm2-135m"])
    assert (config.lora.rank, config.lora.alpha, config.lora.enabled) == (16, 32, True)
    assert (config.fsdp.strategy, config.fsdp.offload_policy) == ("fsdp2", True)
    assert (config.optim.lr_scheduler_type, config.data.max_length) == ("constant", 8192)
    assert config.model.path == FALLBACK


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.rank=4", "lora=r16"], 16),
        (["lora=r16", "lora.rank=4"], 4),
        (["lora=r16", "lora=r64"], 64),
        (["lora.rank=4", "lora.rank=5"], 5),
        (["+lora=r16"], 16),
        (["++lora.rank=5"], 5),
        (["lora={rank: 6}"], 6),
    ],
)
def test_overrides_are_applied_from_left_to_right(overrides, expected):
    assert load_config(overrides).lora.rank == expected


def test_a_choice_replaces_the_one_of_the_defaults_list(own):
    fsdp2 = DEFAULTS.replace("fsdp: default", "fsdp: fsdp2_offload")
    assert own("", defaults=fsdp2).fsdp.offload_policy is True
    config = own("", "fsdp=fsdp", defaults=fsdp2)
    assert (config.fsdp.strategy, config.fsdp.offload_policy) == ("fsdp", False)


def test_a_choice_goes_over_config_yaml_but_only_in_what_it_sets(own):
    body = {"optim": {"lr": 0.5, "lr_scheduler_type": "constant"}}
    assert own(body).optim.lr_scheduler_type == "constant"
    config = own(body, "optim=linear")
    assert (config.optim.lr, config.optim.lr_scheduler_type) == (0.5, "linear")


@pytest.mark.parametrize(
    ("body", "overrides", "expected"),
    [
        ("", [], 2e-5),
        ({"optim": {"lr": 0.5}}, [], 0.5),
        ({"optim": {"lr": 0.5}}, ["optim.lr=0.25"], 0.25),
    ],
)
def test_an_override_goes_over_config_yaml_and_that_over_conf(own, body, overrides, expected):
    assert own(body, *overrides).optim.lr == expected


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora=r17", ["default, off, r16, r64, r8", "Did you mean r16?"]),
        ("fsdp=fdsp2", ["fsdp_offload", "Did you mean fsdp2?"]),
        ("model=qwen", ["qwen2.5-0.5b", "smollm2-135m"]),
        ("optim=", ["constant, cosine"]),
    ],
)
def test_a_choice_that_is_not_there_is_told_with_those_that_are(override, says):
    message = error_of([override])
    assert [text for text in [override, *says] if text not in message] == []


def test_what_is_added_to_the_recipes_own_config_yaml_goes_over_conf(own):
    assert own("\noptim: {lr: 0.5}\n", defaults=(HOME / "config.yaml").read_text()).optim.lr == 0.5


# Values of overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.train_files=[a.json,b.json]", "data.train_files", ["a.json", "b.json"]),
        ("trainer.logger=[console,wandb]", "trainer.logger", ["console", "wandb"]),
        ("data.val_files=null", "data.val_files", None),
        ("optim.betas=[0.8,0.9]", "optim.betas", (0.8, 0.9)),
        ("model.override_config.attention_dropout=0.1", "model.override_config", {"attention_dropout": 0.1}),
        ("model.override_config={a: 1, b: x}", "model.override_config", {"a": 1, "b": "x"}),
        ("optim.override_optimizer_config.eps=1e-6", "optim.override_optimizer_config", {"eps": 1e-6}),
        ("fsdp.mixed_precision.param_dtype=bf16", "fsdp.mixed_precision.param_dtype", "bf16"),
        ("trainer.output_dir=2024_01_02", "trainer.output_dir", "2024_01_02"),
        ("trainer.output_dir=1.10", "trainer.output_dir", "1.10"),
        ("trainer.experiment_name=1e5", "trainer.experiment_name", "1e5"),
        ("trainer.wandb_project=true", "trainer.wandb_project", "true"),
        ("trainer.output_dir='a b, c=d'", "trainer.output_dir", "a b, c=d"),
        ("trainer.output_dir='out/${optim.lr_scheduler_type}'", "trainer.output_dir", "out/cosine"),
    ],
)
def test_an_override_sets_its_key_to_what_is_written(override, key, value):
    found = load_config([override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", "unknown key optim.lrr. Did you mean optim.lr?"),
        ("fsdp.para_offload=true", "unknown key fsdp.para_offload. Did you mean fsdp.param_offload?"),
        ("lr=1", "unknown key lr. Did you mean optim.lr?"),
        ("+foo=1", "unknown key foo."),
        ("++optim.foo=1", "unknown key optim.foo."),
        ("hydra.run.dir=x", "unknown key hydra.run.dir."),
        ("=3", "unknown key"),
        ("fsdp.strategy=fdsp2", "one of fsdp, fsdp2, megatron. Did you mean fsdp2?"),
        ("optim.lr=", "optim.lr is ''"),
        ("optim.lr.foo=1", "optim.lr is {'foo': 1}"),
        ("model=5", "model is 5, but it is a group of keys"),
        ("optim=null", "optim is None, but it is a group of keys"),
        ("optim.lr=1,2", "sweep"),
        ("optim.lr=choice(1,2)", "sweep"),
        ("optim.lr=range(1,3)", "sweep"),
        ("lora=r8,r16", "sweep"),
        ("~optim.lr", "deleting a key is not supported"),
        ("~lora", "deleting a key is not supported"),
        ("optim.lr=[1", "cannot read the override 'optim.lr=[1'"),
        ("trainer.output_dir='${nope}'", "Interpolation key 'nope' not found"),
        ("trainer.output_dir='${'", "cannot be resolved"),
        ("trainer.output_dir='${trainer.output_dir}'", "Recursive interpolation"),
        ("trainer.output_dir=???", "Missing mandatory value: output_dir"),
    ],
)
def test_an_override_that_cannot_be_used_is_told(override, says):
    assert says in error_of([override])


# config.yaml


def test_all_mistakes_of_config_yaml_are_told_at_once(own):
    body = {"optim": {"lrr": 1}, "fsdp": {"strategy": "fdsp"}, "trainr": {"seed": 1}}
    with pytest.raises(ConfigError) as caught:
        own(body)
    message = str(caught.value)
    assert message.startswith("the configuration has 3 mistakes")
    assert "optim.lrr is not a key. Did you mean optim.lr?" in message
    assert "fsdp.strategy is 'fdsp'; it must be one of fsdp, fsdp2, megatron. Did you mean fsdp?" in message
    assert "trainr is not a key." in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"optim: [\n", "line 2"),
        (b"optim: {lr: 1}\noptim: {lr: 2}\n", "duplicate key optim"),
        (b"- a\n- b\n", "holds a list"),
        (b"trainer: {project_name: \xff}\n", "config.yaml"),
        (b"defaults: 3\n", "defaults must be a list"),
        (b"defaults: [{modl: default}]\n", "Could not find 'modl/default'"),
        (b"defaults: [{model: nope}]\n", "Could not find 'model/nope'"),
        (DEFAULTS.encode() + b"optim: 3\n", "optim is 3, but it is a group of keys"),
        (DEFAULTS.encode() + b"optim: [1]\n", "cannot be used"),
        (DEFAULTS.encode() + b"trainer: {output_dir: '${nope}'}\n", "Interpolation key 'nope' not found"),
        (b"", "model is not set: the defaults list of config.yaml must name this group"),
    ],
)
def test_a_config_yaml_that_cannot_be_used_is_told(tmp_path, text, says):
    (tmp_path / "config.yaml").write_bytes(text)
    assert says in error_of([], tmp_path)


@pytest.mark.parametrize("folder", [HOME / "conf", HOME / "config.yaml", Path("/nowhere")])
def test_a_missing_config_yaml_is_told_with_its_place(folder):
    message = error_of([], folder)
    assert str(folder / "config.yaml") in message and "--config-path" in message


@pytest.mark.parametrize("name", ["a b", "a,b", "实验", "a(1)", "a=b", "a'b", "[a]", "$a", "a&b#c", "a\\b", "a:b"])
def test_the_folder_of_config_yaml_may_have_any_name(own, tmp_path, name):
    folder = tmp_path / name
    (folder / "conf" / "lora").mkdir(parents=True)
    (folder / "conf" / "lora" / "mine.yaml").write_text("defaults: [r16]\nalpha: 3\n")
    config = own("optim: {lr: 0.5}\n", "lora=mine", folder=folder)
    assert (config.optim.lr, config.lora.rank, config.lora.alpha) == (0.5, 16, 3)


def test_config_yaml_may_have_another_name_and_stand_in_a_folder_below(tmp_path):
    (tmp_path / "config.yaml").write_text(DEFAULTS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text(DEFAULTS + "optim: {lr: 0.5}\n")
    for folder, name in [(tmp_path / "mine", "small"), (tmp_path / "mine", "small.yaml"), (tmp_path, "mine/small")]:
        assert load_config([], folder, name).optim.lr == 0.5


def test_a_folder_of_ones_own_may_add_choices_to_those_of_the_recipe(own, tmp_path):
    (tmp_path / "conf" / "lora").mkdir(parents=True)
    (tmp_path / "conf" / "lora" / "mine.yaml").write_text("defaults: [default]\nenabled: true\nrank: 3\n")
    assert own("", "lora=mine").lora.rank == 3
    assert own("", "lora=r64").lora.rank == 64
    with pytest.raises(ConfigError, match="mine, off.*Did you mean mine?"):
        own("", "lora=mien")


def test_a_folder_without_conf_gives_no_warning(own, recwarn):
    own("")
    assert not [str(warning.message) for warning in recwarn if "not available" in str(warning.message)]


def test_config_yaml_may_leave_the_trainer_out(own):
    assert own("").trainer == load_config([]).trainer


def test_what_hydra_alone_uses_may_stand_in_config_yaml(own):
    assert own("hydra: {run: {dir: x}}\n") == own("")


@pytest.mark.parametrize(
    "overrides",
    [[], ["lora=r16", "model=smollm2-135m", "optim.betas=[0.8,0.9]", "trainer.output_dir='a: {b} #实验'"]],
)
def test_the_resolved_yaml_is_a_config_yaml_that_composes_to_the_same(own, overrides):
    config = load_config(overrides)
    text = to_yaml(config)
    assert own(text, defaults="") == config
    assert own(text, "lora=r64", "optim.lr=0.5", defaults="").lora.rank == 64


def test_hydras_names_for_the_place_of_config_yaml():
    assert parse_config_args([]) == {}
    both = {"config_dir": Path("/a=b"), "config_name": "c"}
    assert parse_config_args(["--config-path=/a=b", "--config-name=c"]) == both
    assert parse_config_args(["-cp=/a=b", "-cn=c"]) == both
    with pytest.raises(ConfigError, match="unknown argument --config-dir=x"):
        parse_config_args(["--config-dir=x"])


# Data paths


def test_a_relative_data_path_is_taken_from_here_else_from_beside_config_yaml(own, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("beside.json", "both.json", "odd[1].json"):
        (tmp_path / name).touch()
    (here / "both.json").touch()

    def placed(*paths):
        return own({"data": {"train_files": list(paths), "val_files": paths[0]}}).data

    data = placed("beside.json", "both.json", "nowhere.json", "/abs.json", "bes*.json", "odd[1].json", "https://x/y")
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


def test_the_example_data_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(str(load_config([]).data.train_files)).is_file()


@pytest.mark.parametrize("path", [".", "''", "'**a'", "'[a'", "a" * 300, "'~/x'"])
def test_a_data_path_that_cannot_be_one_is_left_to_the_reader(path):
    assert load_config([f"data.train_files={path}"]).data.train_files == path.strip("'")


# The model


def test_the_default_model_has_a_fallback(own):
    assert load_config([]).model.fallback == FALLBACK
    assert own("model: {trust_remote_code: true}\n").model.fallback == FALLBACK
    assert load_config(["model.tokenizer_path=x"]).model.fallback == FALLBACK


@pytest.mark.parametrize(
    "override",
    [f"model.path={DEFAULT_MODEL}", "model.path=x", "++model.path=x", "model=qwen2.5-0.5b", "model={path: x}"],
)
def test_a_model_named_on_the_command_line_has_none(override):
    assert load_config([override]).model.fallback is None


@pytest.mark.parametrize(
    ("defaults", "body"),
    [
        (DEFAULTS, f"model: {{path: {DEFAULT_MODEL}}}\n"),
        (DEFAULTS, "model: {path: '/models/${optim.lr_scheduler_type}'}\n"),
        (DEFAULTS.replace("model: default", "model: qwen2.5-0.5b"), ""),
    ],
)
def test_a_model_named_in_config_yaml_has_none(own, defaults, body):
    assert own(body, defaults=defaults).model.fallback is None


def test_a_fallback_that_is_named_too_stays(own):
    assert load_config(["model.path=x", "model.fallback=y"]).model.fallback == "y"
    assert own("model: {path: x, fallback: y}\n").model.fallback == "y"


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
def test_an_older_long_path_is_another_name_of_the_key(own, older, key, value):
    short = load_config([f"{key}={value}"])
    assert short != load_config([])
    long = f"{older}.{key.split('.', 1)[1]}"
    assert load_config([f"{long}={value}"]) == short
    assert load_config([f"++{long}={value}"]) == short
    assert own(nested(long, value)) == short


def test_the_precedence_is_the_same_for_older_paths(own):
    body = nested(f"{ACTOR}.optim.lr", 0.5)
    assert own(body, "optim.lr=0.25").optim.lr == 0.25
    assert own({"optim": {"lr": 0.5}}, f"{ACTOR}.optim.lr=0.25").optim.lr == 0.25
    assert own(body, "optim=linear").optim.lr == 0.5
    assert load_config([f"{ACTOR}.optim.lr=0.5", "optim.lr=0.25"]).optim.lr == 0.25


@pytest.mark.parametrize(("older", "name"), OLDER_GROUPS.items())
def test_both_names_of_a_group_may_be_used_for_different_keys(own, older, name):
    first, second = {"fsdp": ("param_offload", "optimizer_offload"), "optim": ("weight_decay", "lr")}[name]
    config = getattr(own({name: {first: 1}, **nested(f"{older}.{second}", 1)}), name)
    assert getattr(config, first) and getattr(config, second) == 1


def test_inner_groups_of_both_names_are_merged(own):
    body = {"fsdp": {"mixed_precision": {"param_dtype": "bf16"}}}
    body |= nested(f"{ACTOR}.fsdp_config.mixed_precision.reduce_dtype", "bf16")
    precision = own(body).fsdp.mixed_precision
    assert (precision.param_dtype, precision.reduce_dtype) == ("bf16", "bf16")


@pytest.mark.parametrize(
    ("older", "name", "key", "value", "other"),
    [
        (f"{ACTOR}.optim", "optim", "lr", 0.5, 0.25),
        (f"{ACTOR}.fsdp_config", "fsdp", "mixed_precision.reduce_dtype", "bf16", "fp32"),
    ],
)
def test_two_names_with_two_values_are_an_error(own, older, name, key, value, other):
    with pytest.raises(ConfigError) as caught:
        own({**nested(f"{name}.{key}", value), **nested(f"{older}.{key}", other)})
    assert f"{name}.{key} to {value} and {older}.{key} to {other}" in str(caught.value)


def test_two_names_with_one_value_are_none(own):
    assert own({"optim": {"lr": 0.5}, **nested(f"{ACTOR}.optim.lr", 0.5)}).optim.lr == 0.5


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
def test_what_is_left_of_the_older_layout_is_an_error(own, body):
    with pytest.raises(ConfigError, match="actor_rollout_ref is not a key"):
        own(body)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"{ACTOR}.optim.lrr=1", "unknown key optim.lrr. Did you mean optim.lr?"),
        (f"{ACTOR}.ppo_epochs=1", f"unknown key {ACTOR}.ppo_epochs"),
        ("actor_rollout_ref.model.path=x", "Did you mean model.path?"),
        (f"{ACTOR}.optim=linear", "unknown key"),
        (f"~{ACTOR}.optim.lr", "deleting a key"),
    ],
)
def test_an_older_path_that_leads_nowhere_is_an_error(override, says):
    assert re.search(re.escape(says), error_of([override]))


# Renamed keys


RENAMED = [
    ("data.allow_special_text", "data.parse_special_tokens", True),
    ("trainer.hang_timeout", "trainer.heartbeat_timeout", 7),
]


def test_every_renamed_key_is_tested():
    assert {older: key for older, key, _ in RENAMED} == OLDER_KEYS


@pytest.mark.parametrize(("older", "key", "value"), RENAMED)
def test_the_older_name_of_a_key_means_the_same(own, tmp_path, older, key, value):
    expected = load_config([f"{key}={value}"])
    assert expected != load_config([])
    assert load_config([f"{older}={value}"]) == load_config([f"++{older}={value}"]) == expected
    assert own(nested(older, value)) == expected
    group, _, leaf = older.partition(".")
    if group != "trainer":  # the only group without files of choices
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(f"defaults: [default]\n{leaf}: {str(value).lower()}\n")
        assert own("", f"{group}=mine") == expected


@pytest.mark.parametrize(("older", "key", "value"), RENAMED)
def test_a_later_override_wins_whichever_name_it_uses(own, older, key, value):
    default = load_config([])
    restored = f"{key}={OmegaConf.select(OmegaConf.create(default.public()), key)}"
    assert load_config([f"{older}={value}", restored]) == default
    assert own(nested(older, value), restored) == default


def test_both_names_of_a_key_with_two_values_are_an_error(own):
    with pytest.raises(ConfigError, match="trainer.heartbeat_timeout to 5 and trainer.hang_timeout to 7"):
        own({"trainer": {"hang_timeout": 7, "heartbeat_timeout": 5}})


def test_null_under_the_older_name_of_a_key_is_null(own):
    assert own({"trainer": {"hang_timeout": None}}).trainer.heartbeat_timeout is None


def test_either_is_the_older_name_of_if_else(own):
    assert own("optim: {lr: '${either:${lora.enabled},0.5,0.25}'}\n", "lora.enabled=true").optim.lr == 0.5
