"""Every key has a type, a check and a message; conf/ and config.yaml have the same keys with the same defaults."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from sft_recipe.config.schema import Config
from sft_recipe.config.validation import all_keys, build_config, nearest, text_keys
from sft_recipe.errors import ConfigError

HOME = Path(__file__).resolve().parents[2]
GROUPS = ["model", "data", "optim", "fsdp", "lora", "eval"]
OFFLOADED = {"model.enable_activation_offload": True, "model.enable_gradient_checkpointing": True}
GROUP_FILES = sorted(path for path in HOME.glob("conf/*/*.yaml") if path.parent.name != "recipe")


def tree(**values):
    """Return a small valid tree, with `values` (dotted keys) on top."""
    base = OmegaConf.create({group: {} for group in [*GROUPS, "trainer"]})
    for key, value in {"model.path": "m", "data.train_files": "d.json", **values}.items():
        OmegaConf.update(base, key, value, force_add=True)
    return OmegaConf.to_container(base)


def error_of(**values):
    with pytest.raises(ConfigError) as caught:
        build_config(tree(**values))
    return str(caught.value)


def read(path):
    return OmegaConf.to_container(OmegaConf.load(path))


def leaves(mapping, prefix=""):
    """Dotted keys of the typed configuration, each with its value in `mapping`."""
    result: dict = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and prefix + key not in all_keys():
            result |= leaves(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


# conf/ and the code


def written_defaults():
    """Every key of conf/<group>/default.yaml and of config.yaml."""
    result = leaves({"trainer": read(HOME / "config.yaml")["trainer"]})
    for group in GROUPS:
        result |= leaves({group: read(HOME / "conf" / group / "default.yaml")})
    return result


def test_yaml_files_and_schema_have_the_same_keys():
    assert sorted(written_defaults()) == sorted(all_keys())


def test_yaml_files_and_schema_have_the_same_defaults():
    groups = {group: {} for group in [*GROUPS, "trainer"]}
    in_code = leaves(build_config(groups).model_dump(mode="json"))
    different = {key for key, value in written_defaults().items() if value != in_code[key]}
    assert different == {"optim.lr", "lora.enabled", "fsdp.strategy"}  # depend on LoRA and QLoRA


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_group_file_starts_with_a_comment_and_sets_known_keys(path):
    assert path.read_text().startswith("# ")
    body = read(path)
    body.pop("defaults", None)
    assert body and set(leaves({path.parent.name: body})) <= set(all_keys())


@pytest.mark.parametrize(
    "path", [HOME / "config.yaml", *HOME.glob("conf/*/default.yaml")], ids=lambda path: path.parent.name
)
def test_every_key_has_a_comment(path):
    lines = [line for line in path.read_text().splitlines() if re.match(r"\s*\w+:\s*\S", line)]
    assert lines
    assert [line for line in lines if not re.search(r"\S\s+# [\w<]", line)] == []


def test_every_group_folder_has_several_files():
    assert {path.parent.name for path in GROUP_FILES} == set(GROUPS)
    for group in GROUPS:
        assert len(list((HOME / "conf" / group).glob("*.yaml"))) >= 3


# Values


def test_smallest_tree_has_the_defaults():
    config = build_config(tree())
    assert (config.data.max_length, config.data.train_batch_size, config.data.micro_batch_size_per_gpu) == (2048, 4, 1)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_grad) == (2e-5, 0.01, 1.0)
    assert (config.lora.enabled, config.lora.rank, config.lora.alpha) == (False, 8, 16)
    assert (config.trainer.total_epochs, config.trainer.output_dir) == (3, "./outputs")
    assert (config.trainer.resume_from, config.trainer.nnodes) == (None, 1)


def test_tree_without_trainer_has_the_default_trainer():
    without = tree()
    del without["trainer"]
    assert build_config(without) == build_config(tree())


def test_configuration_is_immutable():
    with pytest.raises(ValidationError):
        build_config(tree()).optim.lr = 1.0


def test_token_budget_and_world_size_are_products():
    batch = {"data.max_length": 100, "data.micro_batch_size_per_gpu": 3}
    nodes = {"trainer.nnodes": 2, "trainer.n_gpus_per_node": 8, "trainer.master_addr": "10.0.0.1"}
    config = build_config(tree(**batch, **nodes))
    assert config.data.token_budget == 300
    assert config.trainer.world_size == 16


def test_number_is_accepted_as_text():
    assert build_config(tree(**{"trainer.wandb_project": 2024})).trainer.wandb_project == "2024"


@pytest.mark.parametrize("value", ["true", "yes", 1, True])
def test_truth_values_have_several_spellings(value):
    assert build_config(tree(**{"lora.enabled": value})).lora.enabled is True


@pytest.mark.parametrize("value", [7, "7", "after_each_epoch", -1])
def test_save_freq_accepts_steps_or_after_each_epoch(value):
    expected = int(value) if value != "after_each_epoch" else value
    assert build_config(tree(**{"trainer.save_freq": value})).trainer.save_freq == expected


def test_cache_dir_follows_key_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build_config(tree()).cache_dir() == tmp_path / "sft_recipe"
    assert build_config(tree(**{"data.cache_dir": "~/mine"})).cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build_config(tree()).cache_dir() == Path.home() / ".cache/sft_recipe"


@pytest.mark.parametrize(
    ("key", "value", "expected_text"),
    [
        ("data.max_length", 1, ["1", "greater than or equal to 2"]),
        ("data.max_length", "long", ["'long'", "integer"]),
        ("data.train_batch_size", 0, ["greater than or equal to 1"]),
        ("data.micro_batch_size_per_gpu", 0, ["greater than or equal to 1"]),
        ("data.val_ratio", 1.0, ["less than 1"]),
        ("data.truncation", "cut", ["'cut'", "drop, right, error"]),
        ("data.format", "alpacca", ["prompt_response", "Did you mean alpaca?"]),
        ("data.train_files", None, ["None"]),
        ("data.num_workers", 0, ["greater than or equal to 1"]),
        ("optim.lr", 0, ["greater than 0"]),
        ("optim.lr", -1e-5, ["greater than 0"]),
        ("optim.lr", "fast", ["'fast'", "number"]),
        ("optim.lr", float("nan"), ["finite number"]),
        ("optim.lr", float("inf"), ["finite number"]),
        ("optim.weight_decay", float("inf"), ["finite number"]),
        ("lora.alpha", float("inf"), ["finite number"]),
        ("optim.lr_scheduler_type", "cosin", ["cosine, linear, constant", "Did you mean cosine?"]),
        ("optim.lr_scheduler_type", "one_cycle", ["Did you mean onecycle?"]),
        ("optim.pct_start", "1.1", ["it should be less than or equal to 1"]),
        ("optim.div_factor", "0", ["it should be greater than 0"]),
        ("optim.final_div_factor", "inf", ["it should be a finite number"]),
        ("optim.power", "-1", ["it should be greater than 0"]),
        ("optim.lr_decay_steps_ratio", "2", ["it should be less than or equal to 1"]),
        ("optim.zero_indexed_step", "maybe", ["it must be true or false"]),
        ("optim.lr_warmup_steps_ratio", 1.5, ["less than or equal to 1"]),
        ("optim.weight_decay", -0.1, ["greater than or equal to 0"]),
        ("optim.clip_grad", -1, ["greater than or equal to 0"]),
        ("optim.clip_grad", float("nan"), ["greater than or equal to 0"]),
        ("optim.betas", [0.9], ["[0.9]", "too few values"]),
        ("optim.betas", [0.9, 1.0], ["[0.9, 1.0]", "at least 0 and less than 1"]),
        ("optim.betas", [-0.1, 0.9], ["at least 0 and less than 1"]),
        ("optim.betas", [0.9, float("nan")], ["at least 0 and less than 1"]),
        ("fsdp.strategy", "fdsp2", ["fsdp, fsdp2, megatron", "Did you mean fsdp2?"]),
        ("fsdp.model_dtype", "bf17", ["fp32, bf16", "Did you mean bf16?"]),
        ("fsdp.mixed_precision.param_dtype", "fp8", ["auto, bf16, fp16, fp32"]),
        ("fsdp.param_offload", "maybe", ["'maybe'", "true or false"]),
        ("lora.rank", 0, ["greater than or equal to 1"]),
        ("lora.rank", 1.5, ["1.5", "integer"]),
        ("lora.alpha", 0, ["greater than 0"]),
        ("lora.rank", True, ["it should be a number"]),
        ("optim.lr", True, ["it should be a number"]),
        ("trainer.max_time", False, ["it should be a number"]),
        ("trainer.save_freq", True, ["it should be a number"]),
        ("model.enable_gradient_checkpointing", "maybe", ["one of true, false, auto"]),
        ("trainer.total_epochs", 0, ["greater than or equal to 1"]),
        ("trainer.save_freq", "sometimes", ["a number of steps, after_each_epoch"]),
        ("trainer.save_freq", 0, ["a number of steps, after_each_epoch, or -1: only at the end"]),
        ("trainer.test_freq", -2, ["a number of steps, after_each_epoch, or -1: only at the end"]),
        ("trainer.seed", 10**19, ["it must be at most 9223372036854775807"]),
        ("trainer.seed", -1, ["greater than or equal to 0"]),
        ("data.max_length", 10**30, ["it must be at most 9223372036854775807"]),
        ("optim.lr_warmup_steps", -(10**30), ["it must be at most 9223372036854775807"]),
        ("trainer.device", "gpu", ["auto, cuda, cpu"]),
        ("trainer.master_port", 70000, ["less than or equal to 65535"]),
        ("trainer.logger", "wandb", ["'wandb'", "list"]),
        ("trainer.logger", ["console", "wandbb"], ["'wandbb'", "one of console, wandb,", "Did you mean wandb?"]),
        ("optim", 3, ["group of keys"]),
    ],
)
def test_invalid_value_is_reported_with_key_and_allowed_values(key, value, expected_text):
    message = error_of(**{key: value})
    assert f"- {key} is " in message
    assert [text for text in expected_text if text not in message] == []
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("values", "expected_text"),
    [
        ({"data.val_files": "v.json", "data.val_ratio": 0.1}, "val_files and val_ratio are both set"),
        ({"fsdp.tensor_model_parallel_size": 2}, "tensor_model_parallel_size is for strategy=megatron"),
        ({"fsdp.offload_policy": True}, "offload_policy is for strategy=fsdp2"),
        ({"fsdp.strategy": "megatron", "fsdp.ulysses_sequence_parallel_size": 2}, "context_parallel_size"),
        ({"model.enable_activation_offload": True}, "needs enable_gradient_checkpointing=true"),
        ({**OFFLOADED, "fsdp.strategy": "megatron"}, "model.enable_activation_offload needs FSDP"),
        ({"lora.merge": True}, "add --use_lora"),
        ({"trainer.node_rank": 1}, "node_rank is 1; with nnodes=1 it ends at 0"),
        ({"trainer.nnodes": 2}, "need master_addr"),
    ],
)
def test_contradicting_values_are_reported(values, expected_text):
    assert expected_text in error_of(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"data.val_files": "v.json"},
        {"data.val_ratio": 0.1},
        {"fsdp.strategy": "megatron", "fsdp.tensor_model_parallel_size": 2},
        {"fsdp.strategy": "fsdp2", "fsdp.offload_policy": True},
        {"fsdp.ulysses_sequence_parallel_size": 2},
        {"lora.enabled": True, "lora.merge": True},
        {"trainer.nnodes": 2, "trainer.node_rank": 1, "trainer.master_addr": "192.168.1.1"},
    ],
)
def test_compatible_values_are_accepted(values):
    built = leaves(build_config(tree(**values)).model_dump())
    assert {key: built[key] for key in values} == values


# Unknown keys


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("optim.lrr", "optim.lr"),
        ("optim.warmup_ratio", "optim.lr_warmup_steps_ratio"),
        ("fsdp.para_offload", "fsdp.param_offload"),
        ("data.batch_size", "data.train_batch_size"),
        ("data.train_file", "data.train_files"),
        ("trainer.lr", "optim.lr"),
        ("trainer.epochs", "trainer.total_epochs"),
        ("lora.r", None),
        ("fsdp.mixed_precision.param_type", "fsdp.mixed_precision.param_dtype"),
    ],
)
def test_unknown_key_suggests_the_nearest_key(key, right):
    message = error_of(**{key: 1})
    assert f"{key} is not a key." in message
    assert right is None or f"Did you mean {right}?" in message


def test_all_mistakes_are_reported_at_once():
    message = error_of(**{"optim.lrr": 1, "fsdp.strategy": "x", "data.max_length": 0, "lora.rank": "many"})
    assert message.startswith("the configuration has 4 mistakes:\n")
    assert [line.split()[1] for line in message.splitlines()[1:]] == [
        "data.max_length",
        "optim.lrr",
        "fsdp.strategy",
        "lora.rank",
    ]


def test_missing_group_is_reported():
    without = tree()
    del without["lora"]
    with pytest.raises(ConfigError, match="lora is not set: the defaults list of config.yaml must name this group"):
        build_config(without)


def test_nothing_is_suggested_for_a_distant_name():
    assert nearest("zzz", all_keys()) == ""
    assert nearest("optim.ler", all_keys()) == " Did you mean optim.lr?"
    assert nearest("max_len", all_keys()) == " Did you mean data.max_length?"


def test_text_keys_accept_names_and_paths():
    assert {"trainer.output_dir", "data.train_files", "data.val_files", "model.path", "lora.exclude_modules"} < set(
        text_keys()
    )
    for key in ("optim.lr", "trainer.save_freq", "fsdp.strategy", "model.override_config", "lora.enabled"):
        assert key in all_keys() and key not in text_keys()


def test_default_config_survives_yaml():
    dumped = build_config(tree()).model_dump(mode="json")
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(dumped))) == build_config(tree())
