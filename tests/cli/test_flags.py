"""Flags, environment variables and overrides are equivalent."""

import re

import pytest
import yaml

from sft_recipe.cli.flags import FLAGS, parse
from sft_recipe.config.compose import load_config, parse_config_args
from sft_recipe.config.validation import all_keys, nearest
from sft_recipe.errors import ConfigError
from tests.support.composing import DEFAULTS

# Variable, short flag, key, default, and a text to set with the value it becomes.
TABLE = [
    ("MODEL_PATH", "model", "model.path", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
    ("TOKENIZER_PATH", None, "model.tokenizer_path", None, "/models/tok", "/models/tok"),
    ("TRAIN_DATA", None, "data.train_files", "./data/example_sft.json", "/data/*.json", "/data/*.json"),
    ("VAL_DATA", None, "data.val_files", None, "/data/val.json", "/data/val.json"),
    ("MAX_LENGTH", None, "data.max_length", 2048, "512", 512),
    ("MAX_TARGET_LENGTH", None, "data.max_target_length", None, "256", 256),
    ("BATCH_SIZE", None, "data.train_batch_size", 4, "8", 8),
    ("MICRO_BATCH_SIZE", None, "data.micro_batch_size_per_gpu", 1, "2", 2),
    ("LEARNING_RATE", "lr", "optim.lr", 2e-5, "1e-5", 1e-5),
    ("RECIPE", None, "trainer.recipe", None, "small", "small"),
    ("NUM_EPOCHS", "epochs", "trainer.total_epochs", 3, "5", 5),
    ("WARMUP_RATIO", None, "optim.lr_warmup_steps_ratio", 0.1, "0.25", 0.25),
    ("WEIGHT_DECAY", None, "optim.weight_decay", 0.01, "0.5", 0.5),
    ("GRAD_CLIP", None, "optim.clip_grad", 1.0, "0.3", 0.3),
    ("N_GPUS", None, "trainer.n_gpus_per_node", 1, "4", 4),
    ("STRATEGY", None, "fsdp.strategy", "fsdp", "fsdp2", "fsdp2"),
    ("USE_LORA", None, "lora.enabled", False, "true", True),
    ("LORA_RANK", None, "lora.rank", 8, "4", 4),
    ("LORA_ALPHA", None, "lora.alpha", 16, "32", 32),
    ("NNODES", None, "trainer.nnodes", 1, "2", 2),
    ("NODE_RANK", None, "trainer.node_rank", 0, "1", 1),
    ("MASTER_ADDR", None, "trainer.master_addr", "localhost", "192.168.1.1", "192.168.1.1"),
    ("MASTER_PORT", None, "trainer.master_port", None, "29501", 29501),
    ("OUTPUT_DIR", None, "trainer.output_dir", "./outputs", "/runs/2024_01_02", "/runs/2024_01_02"),
    ("RESUME_FROM", None, "trainer.resume_from", None, "auto", "auto"),
    ("AUTO_RESTART", None, "trainer.auto_restart", 0, "3", 3),
    ("WANDB_PROJECT", None, "trainer.wandb_project", None, "my_sft", "my_sft"),
]
# Some values are valid only together with others.
TOGETHER = {
    "trainer.nnodes": ["trainer.master_addr=10.0.0.1"],
    "trainer.node_rank": ["trainer.nnodes=2", "trainer.master_addr=10.0.0.1"],
}
ROWS = pytest.mark.parametrize(
    ("variable", "short", "key", "default", "text", "value"), TABLE, ids=[row[0] for row in TABLE]
)


def get(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def resolved(*args, **environment):
    line = parse(list(args), environment)
    return load_config(line.overrides, **parse_config_args(line.config_args))


def error_of(*args, **environment):
    with pytest.raises(ConfigError) as caught:
        parse(list(args), environment)
    return str(caught.value)


# The table


@ROWS
def test_variable_flag_short_flag_and_override_are_equivalent(variable, short, key, default, text, value):
    more = TOGETHER.get(key, [])
    expected = load_config([*more, f"{key}={text}"])
    assert get(expected, key) == value != default
    name = variable.lower()
    spellings = [[f"--{name}", text], [f"--{name}={text}"], [f"--{name.replace('_', '-')}", text]]
    spellings += [[f"--{short}", text], [f"--{short}={text}"]] if short else []
    overrides = {tuple(parse(words, {}).overrides) for words in spellings}
    overrides |= {tuple(parse([], {name: text}).overrides) for name in (variable, short and short.upper()) if name}
    assert {load_config([*more, *texts]).model_dump_json() for texts in overrides} == {expected.model_dump_json()}


@ROWS
def test_default_matches_the_table(variable, short, key, default, text, value):
    assert get(load_config([]), key) == default


@ROWS
def test_empty_variable_is_ignored(variable, short, key, default, text, value):
    assert parse([], {variable: ""}).overrides == []


def test_table_lists_every_flag():
    assert {flag.variable for flag in FLAGS} == {row[0] for row in TABLE} | {"MERGE_LORA", "USE_QLORA"}


def test_use_qlora_enables_lora_and_fsdp2():
    found = resolved("--use_qlora")
    assert found == resolved(USE_QLORA="1") == load_config(["lora.quantize=true"])
    assert (found.lora.enabled, found.fsdp.strategy, found.optim.lr) == (True, "fsdp2", 2e-4)
    assert not load_config([]).lora.enabled


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_flag_name_used_as_key_suggests_the_key(flag):
    for name in filter(None, (flag.name, flag.short)):
        for wrong in {name, f"{flag.key.split('.')[0]}.{name}"} - set(all_keys()):
            assert nearest(wrong, all_keys()) == f" Did you mean {flag.key}?"


def test_merge_lora_is_a_flag():
    expected = load_config(["lora.enabled=true", "lora.merge=true"])
    assert resolved("--use_lora", "--merge_lora") == resolved(USE_LORA="1", MERGE_LORA="true") == expected
    assert expected.lora.merge is True


@pytest.fixture
def help_text(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"], {})
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_help_shows_each_flag_with_its_default(flag, help_text):
    pattern = rf"--{flag.name} [^(]*.*?\(default: ([^;]*); {re.escape(flag.key)}\)"
    shown = re.findall(pattern, help_text)[0].rpartition("(default: ")[2]
    default = get(load_config([]), flag.key)
    if default is None:
        assert shown in ("none", "free", "the model's", "max_length")
    else:
        assert yaml.safe_load(shown) == default or float(shown) == default


@pytest.mark.parametrize(
    "word", ["--dry_run", "--config-path", "--config-name", "--lang", "--help", "SFT_DEBUG", "conf/"]
)
def test_help_shows_other_options(word, help_text):
    assert word in help_text


def test_help_hides_how_overrides_are_marked(help_text):
    assert "hydra-override" not in help_text


# Precedence


@pytest.mark.parametrize(
    ("variable", "flag", "key"),
    [
        ("LEARNING_RATE", "--lr", "optim.lr"),
        ("NUM_EPOCHS", "--epochs", "trainer.total_epochs"),
        ("LORA_RANK", "--lora_rank", "lora.rank"),
        ("BATCH_SIZE", "--batch_size", "data.train_batch_size"),
        ("OUTPUT_DIR", "--output_dir", "trainer.output_dir"),
    ],
)
def test_precedence_is_override_flag_variable_config_yaml_conf(tmp_path, variable, flag, key):
    group, _, name = key.partition(".")
    (tmp_path / "config.yaml").write_text(DEFAULTS + f"{group}: {{{name}: 12}}\n")
    given = [f"--config-path={tmp_path}", f"{key}=15", flag, "14"]
    as_is = type(get(load_config([]), key))
    assert get(resolved(*given, **{variable: "13"}), key) == as_is(15)
    assert get(resolved(given[0], *given[2:], **{variable: "13"}), key) == as_is(14)
    assert get(resolved(given[0], **{variable: "13"}), key) == as_is(13)
    assert get(resolved(given[0]), key) == as_is(12)
    assert get(resolved(), key) != as_is(12)


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["lora=r16"], {"LORA_RANK": "4"}),
        (["--lora_rank", "4", "lora=r16"], {}),
        (["lora=r16", "--lora_rank", "4"], {}),
    ],
)
def test_group_choice_has_precedence_of_an_override(words, environment):
    config = resolved(*words, **environment)
    assert (config.lora.enabled, config.lora.rank, config.lora.alpha) == (True, 16, 32)


def test_group_choice_keeps_flags_of_other_keys():
    config = resolved("lora=r16", "--lr", "1", "fsdp=fsdp2", STRATEGY="fsdp", BATCH_SIZE="6")
    assert (config.lora.rank, config.optim.lr, config.fsdp.strategy) == (16, 1, "fsdp2")
    assert config.data.train_batch_size == 6


def test_flag_overrides_choice_in_defaults_list(tmp_path):
    (tmp_path / "config.yaml").write_text(DEFAULTS.replace("lora: default", "lora: r16"))
    assert resolved(f"--config-path={tmp_path}").lora.rank == 16
    assert resolved(f"--config-path={tmp_path}", "--lora_rank=4").lora.rank == 4


@pytest.mark.parametrize(
    ("words", "expected_text"),
    [
        (["--lr", "1", "--learning-rate", "2"], "notice: --learning_rate 2 replaces --lr 1: the last one is used\n"),
        (["--lr", "1", "--lr=2"], "notice: --lr 2 replaces --lr 1: the last one is used\n"),
        (["--lr", "2", "--lr", "2"], ""),
    ],
)
def test_last_of_several_equal_flags_wins_with_a_notice(words, expected_text, capsys):
    assert resolved(*words).optim.lr == 2
    errors = capsys.readouterr().err
    assert errors.startswith(expected_text) and errors.count("\n") == bool(expected_text)


def test_blank_variables_are_not_set():
    assert parse([], {"OUTPUT_DIR": " ", "MODEL_PATH": "", "LR": "\t"}).overrides == []


def test_variables_of_one_flag_with_different_values_are_an_error():
    assert error_of(LEARNING_RATE="1", LR="2") == (
        "the environment variables LR=2 and LEARNING_RATE=1 set the same key; keep one of them"
    )
    assert parse([], {"LEARNING_RATE": "1", "LR": "1"}).overrides == ["optim.lr=1"]
    assert parse([], {"LEARNING_RATE": "1", "LR": ""}).overrides == ["optim.lr=1"]
    assert parse(["--lr", "3"], {"LEARNING_RATE": "1", "LR": "2"}).overrides == ["optim.lr=3"]


def test_overrides_come_last_and_keep_their_order():
    line = parse(["optim.lr=1", "--epochs", "2", "lora=r8"], {"BATCH_SIZE": "3", "NUM_EPOCHS": "9"})
    assert line.overrides == ["data.train_batch_size=3", "trainer.total_epochs=2", "optim.lr=1", "lora=r8"]


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--model", "Qwen/Qwen2.5-0.5B"], {}),
        ([], {"MODEL_PATH": "Qwen/Qwen2.5-0.5B"}),
        (["model.path=Qwen/Qwen2.5-0.5B"], {}),
    ],
)
def test_named_model_has_no_fallback(words, environment):
    assert resolved().model.fallback
    assert resolved(*words, **environment) == load_config(["model.path=Qwen/Qwen2.5-0.5B"])
    assert resolved(*words, **environment).model.fallback is None


# How flags are written


@pytest.mark.parametrize(
    ("words", "enabled"),
    [
        (["--use_lora"], True),
        (["--use-lora"], True),
        (["--use_lora", "true"], True),
        (["--use_lora=True"], True),
        (["--use_lora", "optim.lr=1"], True),
        (["--use_lora", "--epochs", "1"], True),
        (["--use_lora", "false"], False),
        (["--use_lora", "False"], False),
        (["--use_lora=false"], False),
    ],
)
def test_switch_has_an_optional_value(words, enabled):
    assert f"lora.enabled={str(enabled).lower()}" in [text.lower() for text in parse(words, {}).overrides]
    assert resolved(*words, USE_LORA="false" if enabled else "true").lora.enabled is enabled


@pytest.mark.parametrize("value", ["0", "false", "off", "no"])
def test_switch_in_the_environment_can_be_off(value):
    assert resolved(USE_LORA=value).lora.enabled is False


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--train_data", "a.json", "b c.json", "1_0"], {}),
        (["--train_data", "a.json,b c.json,1_0"], {}),
        (["--train_data=a.json,b c.json,1_0"], {}),
        (["--train_data", "a.json,b c.json,", "1_0", "--epochs", "3"], {}),
        (["--train-data", "a.json", "b c.json", "1_0", "optim.lr=2e-5"], {}),
        ([], {"TRAIN_DATA": "a.json,b c.json,1_0"}),
        (["data.train_files=[a.json,'b c.json','1_0']"], {}),
        (["--train_data", "a.json", "--epochs", "3", "--train-data", "b c.json", "1_0"], {}),
        (["--train_data", "[a.json, 'b c.json', 1_0]"], {}),
        ([], {"TRAIN_DATA": '["a.json","b c.json","1_0"]'}),
    ],
)
def test_several_files_are_accepted(words, environment):
    config = resolved(*words, **environment)
    assert config == load_config(["data.train_files=[a.json,'b c.json','1_0']"])
    assert config.data.train_files == ["a.json", "b c.json", "1_0"]


@pytest.mark.parametrize("value", ["none", "None", "null"])
def test_none_resets_a_value(value):
    assert resolved("--resume_from", value, RESUME_FROM="auto").trainer.resume_from is None
    assert resolved("--val_data", value).data.val_files is None


@pytest.mark.parametrize("value", ["-1", "-1e-5", "-.5", "-2.5E+3"])
@pytest.mark.parametrize("name", ["--lr", "--learning_rate", "--learning-rate"])
def test_negative_number_is_a_value(name, value):
    assert parse([name, value, "--epochs", "3"], {}).overrides == [f"optim.lr={value}", "trainer.total_epochs=3"]


@pytest.mark.parametrize(
    ("value", "expected"), [("yes", True), ("ON", True), ("1", True), ("no", False), ("off", False)]
)
def test_switch_accepts_the_same_words_as_flag_and_as_variable(value, expected):
    flag, variable = resolved("--use_lora", value), resolved(USE_LORA=value)
    assert flag == variable and flag.lora.enabled is expected
    assert flag.optim.lr == (2e-4 if expected else 2e-5)


@pytest.mark.parametrize("words", [["--config-path", "/a b"], ["--config-path=/a b"], ["--config_path=/a b"]])
def test_config_path_and_name_are_passed_on(words):
    line = parse([*words, "--config-name", "c"], {})
    assert line.config_args == ["--config-path=/a b", "--config-name=c"]
    assert line.overrides == []


@pytest.mark.parametrize(
    ("words", "expected_text"),
    [
        (["--epoch", "3"], "unknown flag --epoch. Did you mean --epochs?"),
        (["--modle=x"], "unknown flag --modle. Did you mean --model?"),
        (["--batchsize", "2"], "unknown flag --batchsize. Did you mean --batch_size?"),
        (["--BATCH_SIZE", "2"], "unknown flag --BATCH_SIZE. Did you mean --batch_size?"),
        (["--dry_run=true"], "--dry_run takes no value"),
        (["--config-path="], "--config-path needs a value"),
        (["--zzz"], "unknown flag --zzz. See ./train.sh --help."),
        (["--"], "unknown flag --."),
        (["--epochs"], "--epochs needs a value"),
        (["--epochs", "--lr", "1"], "--epochs needs a value"),
        (["--lr="], "--lr needs a value"),
        (["--learning_rate="], "--learning_rate needs a value"),
        (["--learning-rate"], "--learning_rate needs a value"),
        (["--lr"], "--lr needs a value"),
        (["--output_dir", ""], "--output_dir needs a value"),
        (["--train_data", ","], "--train_data needs a value"),
        (["--train_data", "[]"], "--train_data needs a value"),
        (["--use_lora="], "--use_lora needs a value"),
        (["stray"], "cannot read 'stray'"),
        (["--epochs", "3", "4"], "cannot read '4'"),
        (["--use_lora", "perhaps"], "--use_lora: 'perhaps' is neither true nor false"),
        (["--train_data", "a", "lora=r16", "b"], "cannot read 'b'"),
    ],
)
def test_invalid_command_line_is_reported(words, expected_text):
    assert expected_text in error_of(*words)


def test_variable_without_a_value_is_reported_by_its_name():
    assert error_of(TRAIN_DATA=",") == "TRAIN_DATA needs a value"


@pytest.mark.parametrize(
    ("words", "environment", "expected_text"),
    [
        (["--epochs", "many"], {}, "trainer.total_epochs is 'many'"),
        ([], {"STRATEGY": "fdsp2"}, "Did you mean fsdp2?"),
        ([], {"USE_LORA": "perhaps"}, "lora.enabled is 'perhaps'"),
        ([], {"N_GPUS": "0"}, "trainer.n_gpus_per_node is 0"),
        (["--train_data", "none"], {}, "data.train_files is None"),
    ],
)
def test_invalid_value_is_reported_with_its_key(words, environment, expected_text):
    with pytest.raises(ConfigError, match=re.escape(expected_text)):
        resolved(*words, **environment)
