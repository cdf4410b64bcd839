"""config.yaml, conf/ and overrides compose to one validated configuration, or to an error that explains."""

import re
from pathlib import Path

import pytest
import yaml

from sft_recipe.config.compose import HOME, load_config, parse_config_args, to_yaml
from sft_recipe.config.preflight import check_config
from sft_recipe.errors import ConfigError
from tests.support.composing import DEFAULTS, FALLBACK, error_of

CHOICES = sorted((path.parent.name, path.stem) for path in HOME.glob("conf/*/*.yaml") if path.parent.name != "recipe")


# Groups


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_group_file_composes_to_its_values(group, choice):
    validation = ["data.val_ratio=0.1"] if group == "eval" else []
    config = load_config([f"{group}={choice}", *validation]).model_dump(mode="json")
    expected = yaml.safe_load((HOME / "conf" / group / f"{choice}.yaml").read_text())
    expected.pop("defaults", None)
    if group == "model":
        expected["fallback"] = None
    expected = {key: value for key, value in expected.items() if "${" not in str(value)}
    assert {key: config[group][key] for key in expected} == expected


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
def test_default_learning_rate_is_ten_times_higher_with_lora(overrides, rate):
    assert load_config(overrides).optim.lr == rate


def test_choices_of_different_groups_combine():
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


def test_choice_replaces_that_of_the_defaults_list(compose_own):
    fsdp2 = DEFAULTS.replace("fsdp: default", "fsdp: fsdp2_offload")
    assert compose_own("", defaults=fsdp2).fsdp.offload_policy is True
    config = compose_own("", "fsdp=fsdp", defaults=fsdp2)
    assert (config.fsdp.strategy, config.fsdp.offload_policy) == ("fsdp", False)


def test_choice_overrides_config_yaml_only_in_its_keys(compose_own):
    body = {"optim": {"lr": 0.5, "lr_scheduler_type": "constant"}}
    assert compose_own(body).optim.lr_scheduler_type == "constant"
    config = compose_own(body, "optim=linear")
    assert (config.optim.lr, config.optim.lr_scheduler_type) == (0.5, "linear")


@pytest.mark.parametrize(
    ("body", "overrides", "expected"),
    [
        ("", [], 2e-5),
        ({"optim": {"lr": 0.5}}, [], 0.5),
        ({"optim": {"lr": 0.5}}, ["optim.lr=0.25"], 0.25),
    ],
)
def test_override_beats_config_yaml_and_config_yaml_beats_conf(compose_own, body, overrides, expected):
    assert compose_own(body, *overrides).optim.lr == expected


@pytest.mark.parametrize(
    ("override", "expected_texts"),
    [
        ("lora=r17", ["default, off, r16, r64, r8", "Did you mean r16?"]),
        ("fsdp=fdsp2", ["fsdp_offload", "Did you mean fsdp2?"]),
        ("model=qwen", ["qwen2.5-0.5b", "smollm2-135m"]),
        ("optim=", ["constant, cosine"]),
    ],
)
def test_unknown_choice_is_reported_with_the_known_ones(override, expected_texts):
    message = error_of([override])
    assert [text for text in [override, *expected_texts] if text not in message] == []


def test_values_added_to_config_yaml_beat_conf(compose_own):
    assert compose_own("\noptim: {lr: 0.5}\n", defaults=(HOME / "config.yaml").read_text()).optim.lr == 0.5


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
        ("trainer.run_name=1e5", "trainer.run_name", "1e5"),
        ("trainer.wandb_project=true", "trainer.wandb_project", "true"),
        ("trainer.output_dir='a b, c=d'", "trainer.output_dir", "a b, c=d"),
        ("trainer.output_dir='out/${optim.lr_scheduler_type}'", "trainer.output_dir", "out/cosine"),
    ],
)
def test_override_sets_its_key(override, key, value):
    actual = load_config([override])
    for part in key.split("."):
        actual = getattr(actual, part)
    assert actual == value


@pytest.mark.parametrize(
    ("override", "expected_text"),
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
        ("trainer.output_dir='${nope}'", "trainer.output_dir cannot be resolved: Interpolation key 'nope' not found."),
        ("trainer.output_dir=${oc.env:NOPE_X}", "cannot be resolved: Environment variable 'NOPE_X' not found. ${"),
        ("optim={lr: '${nope}'}", "optim.lr cannot be resolved: Interpolation key 'nope' not found"),
        ("lora=5", "lora is 5, but it is a group of keys"),
        ("trainer.output_dir='${'", "cannot be resolved"),
        ("trainer.output_dir='${trainer.output_dir}'", "Recursive interpolation"),
        ("trainer.output_dir=???", "Missing mandatory value: output_dir"),
    ],
)
def test_invalid_override_is_reported(override, expected_text):
    message = error_of([override])
    assert expected_text in message and "full_key" not in message


# config.yaml


def test_a_key_that_repeats_the_mistake_of_another_is_no_mistake():
    with pytest.raises(ConfigError) as caught:
        load_config(["lora.quantize=nf4"])
    lines = ["the configuration has a mistake:", "  - lora.quantize is 'nf4'; it must be true or false"]
    assert str(caught.value).splitlines() == lines
    with pytest.raises(ConfigError, match="has 2 mistakes"):  # both are written
        load_config(["lora.quantize=nf4", "lora.enabled=perhaps"])


def test_all_mistakes_of_config_yaml_are_reported_at_once(compose_own):
    body = {"optim": {"lrr": 1}, "fsdp": {"strategy": "fdsp"}, "trainr": {"seed": 1}}
    with pytest.raises(ConfigError) as caught:
        compose_own(body)
    message = str(caught.value)
    assert message.startswith("the configuration has 3 mistakes")
    assert "optim.lrr is not a key. Did you mean optim.lr?" in message
    assert "fsdp.strategy is 'fdsp'; it must be one of fsdp, fsdp2, megatron. Did you mean fsdp?" in message
    assert "trainr is not a key." in message


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        (b"optim: [\n", "line 2"),
        (b"optim: {lr: 1}\noptim: {lr: 2}\n", "duplicate key optim"),
        (b"- a\n- b\n", "contains a list"),
        (b"trainer: {project_name: \xff}\n", "config.yaml"),
        (b"defaults: 3\n", "defaults must be a list"),
        (b"defaults: [{modl: default}]\n", "Could not find 'modl/default'"),
        (b"defaults: [{model: nope}]\n", "Could not find 'model/nope'"),
        (DEFAULTS.encode() + b"optim: 3\n", "optim is 3, but it is a group of keys"),
        (DEFAULTS.encode() + b"optim: [1]\n", "cannot be used"),
        (DEFAULTS.encode() + b"trainer: {output_dir: '${nope}'}\n", "Interpolation key 'nope' not found"),
        (b"", "model, data, optim, fsdp, lora are not set: the defaults list of config.yaml must name these groups ("),
        (b"trainer: {seed: 1}\n", "(- model: default, - data: default, - optim: default, - fsdp: default, - lora: de"),
        (b"defaults:\n", "defaults must be a list"),
        (b"defaults: [model]\n", "an entry of the defaults list names a group and a file"),
        (b"defaults: [{modl: default}]\n", "Did you mean model?"),
        (b"defaults: [{model: nope}]\n", "the choices are default, qwen2.5-0.5b"),
        (b"defaults: [{model: defualt}]\n", "Did you mean default?"),
        (
            DEFAULTS.replace("  - lora: default\n", "").encode(),
            "lora is not set: the defaults list of config.yaml must",
        ),
        (DEFAULTS.encode() + b"lora: r16\n", "lora is 'r16', but it is a group of keys"),
        (DEFAULTS.encode() + b"optim: [1]\n", "optim is [1], but it is a group of keys"),
        (
            DEFAULTS.encode() + b"trainer: {output_dir: '${'}\n",
            "trainer.output_dir cannot be resolved: its reference is",
        ),
        (DEFAULTS.encode() + b"optim: {lr: '${if_else:1}'}\n", "it is written ${if_else:CONDITION,VALUE,OTHERWISE}"),
        (DEFAULTS.encode() + b"hydra: {foo: 1}\n", "Key 'foo' not in"),
    ],
)
def test_invalid_config_yaml_is_one_message_without_internals_of_hydra(tmp_path, text, expected_text):
    (tmp_path / "config.yaml").write_bytes(text)
    message = error_of([], tmp_path)
    assert expected_text in message
    assert not re.search(r"provider=|full_key|object_type|Config search path|Error raised", message)


def test_invalid_file_of_conf_is_one_message_that_names_it(tmp_path):
    (tmp_path / "config.yaml").write_text(DEFAULTS)
    (tmp_path / "conf/lora").mkdir(parents=True)
    (tmp_path / "conf/lora/mine.yaml").write_text("defaults: [nope]\n")
    message = error_of(["lora=mine"], tmp_path)
    assert "In 'lora/mine': Could not load 'lora/nope'; an entry" in message and "provider" not in message


@pytest.mark.parametrize("folder", [HOME / "conf", HOME / "config.yaml", Path("/nowhere")])
def test_missing_config_yaml_is_reported_with_its_path(folder):
    message = error_of([], folder)
    assert str(folder / "config.yaml") in message and "--config-path" in message


@pytest.mark.parametrize("name", ["a b", "a,b", "实验", "a(1)", "a=b", "a'b", "[a]", "$a", "a&b#c", "a\\b", "a:b"])
def test_folder_of_config_yaml_can_have_any_name(compose_own, tmp_path, name):
    folder = tmp_path / name
    (folder / "conf" / "lora").mkdir(parents=True)
    (folder / "conf" / "lora" / "mine.yaml").write_text("defaults: [r16]\nalpha: 3\n")
    config = compose_own("optim: {lr: 0.5}\n", "lora=mine", folder=folder)
    assert (config.optim.lr, config.lora.rank, config.lora.alpha) == (0.5, 16, 3)


def test_config_yaml_can_have_another_name_and_folder(tmp_path):
    (tmp_path / "config.yaml").write_text(DEFAULTS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text(DEFAULTS + "optim: {lr: 0.5}\n")
    for folder, name in [(tmp_path / "mine", "small"), (tmp_path / "mine", "small.yaml"), (tmp_path, "mine/small")]:
        assert load_config([], folder, name).optim.lr == 0.5


def test_conf_beside_config_yaml_adds_choices(compose_own, tmp_path):
    (tmp_path / "conf" / "lora").mkdir(parents=True)
    (tmp_path / "conf" / "lora" / "mine.yaml").write_text("defaults: [default]\nenabled: true\nrank: 3\n")
    assert compose_own("", "lora=mine").lora.rank == 3
    assert compose_own("", "lora=r64").lora.rank == 64
    with pytest.raises(ConfigError, match="mine, off.*Did you mean mine?"):
        compose_own("", "lora=mien")


def test_folder_without_conf_gives_no_warning(compose_own, recwarn):
    compose_own("")
    assert not [str(warning.message) for warning in recwarn if "not available" in str(warning.message)]


def test_config_yaml_can_omit_the_trainer(compose_own):
    assert compose_own("").trainer == load_config([]).trainer


def test_reference_to_a_key_that_no_file_sets_is_its_default(compose_own, tmp_path):
    config = compose_own("trainer: {run_name: 'run-${trainer.seed}-${fsdp.strategy}'}\n")
    assert config.trainer.run_name == "run-42-fsdp"
    (tmp_path / "conf/lora").mkdir(parents=True)
    (tmp_path / "conf/lora/mine.yaml").write_text("rank: 3\n")  # without the file of defaults, and lr depends on LoRA
    own = compose_own("", defaults=DEFAULTS.replace("lora: default", "lora: mine"))
    assert (own.lora.rank, own.lora.enabled, own.optim.lr) == (3, False, 2e-5)


def test_config_yaml_can_have_keys_of_hydra(compose_own):
    assert compose_own("hydra: {run: {dir: x}}\n") == compose_own("")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["lora=r16", "model=smollm2-135m", "optim.betas=[0.8,0.9]", "trainer.output_dir='a: {b} #实验'"],
        [r"trainer.output_dir='\${HOME}/x'", r"model.override_config={a: ['\\\${b}']}"],
    ],
)
def test_resolved_yaml_is_a_valid_config_yaml(compose_own, overrides):
    config = load_config(overrides)
    text = to_yaml(config)
    assert compose_own(text, defaults="") == config
    assert compose_own(text, "lora=r64", "optim.lr=0.5", defaults="").lora.rank == 64


def test_config_path_and_name_are_parsed():
    assert parse_config_args([]) == {}
    both = {"config_dir": Path("/a=b"), "config_name": "c"}
    assert parse_config_args(["--config-path=/a=b", "--config-name=c"]) == both
    assert parse_config_args(["-cp=/a=b", "-cn=c"]) == both
    with pytest.raises(ConfigError, match="unknown argument --config-dir=x"):
        parse_config_args(["--config-dir=x"])


def test_value_that_refers_to_itself_is_one_message(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a [*a]\n")
    with pytest.raises(ConfigError, match="refers to itself"):
        load_config([], tmp_path)


def test_folder_that_is_a_symlink_loop_is_one_message(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="there is no .*loop/config.yaml"):
        load_config([], tmp_path / "loop")


@pytest.mark.parametrize("path", ["~nobody_of_that_name/x", "~"])
def test_unknown_home_folder_is_no_traceback(path):
    with pytest.raises(ConfigError, match="there is no"):
        load_config([], Path(path))


@pytest.mark.parametrize("override", ["model.path=''", "trainer.output_dir=''"])
def test_empty_value_is_an_error(override):
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]} is empty; it needs a value"):
        load_config([override])


@pytest.mark.parametrize("version", ["abc", "null", "1.5", "0", "-1", "true"])
def test_format_version_that_is_no_version_is_an_error_without_wrong_advice(tmp_path, version):
    (tmp_path / "config.yaml").write_text(f"format_version: {version}\n")
    with pytest.raises(ConfigError, match="it is a whole number from 1"):
        load_config([], tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.columns={prompt: 问题, response: 'a: 答'}", {"prompt": "问题", "response": "a: 答"}),
        ('eval.prompts=[你好 世界, Hi,"好"]', ["你好 世界", "Hi", "好"]),
        ("data.train_files=/训练/数据 1.jsonl*0.5", "/训练/数据 1.jsonl*0.5"),
        ("data.train_files='é.json'", "é.json"),
    ],
)
def test_text_that_is_not_ascii_needs_no_quotes(override, expected):
    key = override.partition("=")[0]
    found = load_config([override]).model_dump()
    group, _, name = key.partition(".")
    value = found[group][name]
    assert value == expected or (key == "data.train_files" and str(value).endswith(expected))


def test_training_needs_data():
    with pytest.raises(ConfigError, match="data.train_files is empty; name a file"):
        check_config(load_config(["data.train_files=[]"]), "auto")


def test_fsdp1_ranks_that_shard_nothing_are_refused():
    """PyTorch's FSDP1 falls back to NO_SHARD in groups of one rank, and no rank gets the gradients of others."""
    alone = load_config(["trainer.n_gpus_per_node=2", "data.train_batch_size=4", "fsdp.fsdp_size=1"])
    with pytest.raises(ConfigError, match="does not add up the gradients"):
        check_config(alone, "cuda")
    check_config(alone, "cpu")  # where the strategy is fsdp2
