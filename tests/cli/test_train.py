"""Flags, environment and overrides mean the same; the torchrun command lines are frozen; errors are one message."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sft_recipe.cli import train as launch
from sft_recipe.cli.train import FLAGS, help_text, main, parse
from sft_recipe.config import compose
from sft_recipe.config.compose import HOME, load_config, parse_config_args
from sft_recipe.config.schema import all_keys, nearest
from sft_recipe.errors import ConfigError, DataError
from sft_recipe.launch import local
from sft_recipe.launch.local import torchrun_args
from tests.config.test_compose import DEFAULTS, compose_remembered
from tests.support import runs

# The table: variable, short form, key, default, and a value to set with what becomes of it.
TABLE = [
    ("MODEL_PATH", "model", "model.path", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
    ("TOKENIZER_PATH", None, "model.tokenizer_path", None, "/models/tok", "/models/tok"),
    ("TRAIN_DATA", None, "data.train_files", "./data/example_sft.json", "/data/*.json", "/data/*.json"),
    ("VAL_DATA", None, "data.val_files", None, "/data/val.json", "/data/val.json"),
    ("MAX_LENGTH", None, "data.max_length", 2048, "512", 512),
    ("BATCH_SIZE", None, "data.train_batch_size", 4, "8", 8),
    ("MICRO_BATCH_SIZE", None, "data.micro_batch_size_per_gpu", 1, "2", 2),
    ("LEARNING_RATE", "lr", "optim.lr", 2e-5, "1e-5", 1e-5),
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
# Some values are good only together with others.
TOGETHER = {
    "trainer.nnodes": ["trainer.master_addr=10.0.0.1"],
    "trainer.node_rank": ["trainer.nnodes=2", "trainer.master_addr=10.0.0.1"],
}
ROWS = pytest.mark.parametrize(
    ("variable", "short", "key", "default", "text", "value"), TABLE, ids=[row[0] for row in TABLE]
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """No variable of the table from outside, no debugging; Hydra reads the recipe's own files once."""
    for flag in FLAGS:
        monkeypatch.delenv(flag.variable, raising=False)
    monkeypatch.delenv("SFT_DEBUG", raising=False)
    monkeypatch.chdir(HOME)
    monkeypatch.setattr(compose, "_compose", compose_remembered)


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


def torchrun(*args, **environment):
    """The torchrun command of a command line, as one line of shell."""
    line = parse(list(args), environment)
    trainer = load_config(line.overrides, **parse_config_args(line.config_args)).trainer
    return shlex.join(["torchrun", *torchrun_args(trainer, line.overrides, line.config_args)])


# The table


@ROWS
def test_variable_flag_short_flag_and_override_do_the_same(variable, short, key, default, text, value):
    more = TOGETHER.get(key, [])
    expected = load_config([*more, f"{key}={text}"])
    assert get(expected, key) == value != default
    name = variable.lower()
    spellings = [[f"--{name}", text], [f"--{name}={text}"], [f"--{name.replace('_', '-')}", text]]
    spellings += [[f"--{short}", text], [f"--{short}={text}"]] if short else []
    overrides = {tuple(parse(words, {}).overrides) for words in spellings}
    overrides.add(tuple(parse([], {variable: text}).overrides))
    assert {load_config([*more, *texts]).model_dump_json() for texts in overrides} == {expected.model_dump_json()}


@ROWS
def test_the_default_is_that_of_the_table(variable, short, key, default, text, value):
    assert get(load_config([]), key) == default


@ROWS
def test_an_empty_variable_is_one_that_is_not_set(variable, short, key, default, text, value):
    assert parse([], {variable: ""}).overrides == []


def test_every_flag_stands_in_the_table():
    assert {flag.variable for flag in FLAGS} == {row[0] for row in TABLE} | {"MERGE_LORA"}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_a_flags_name_used_as_a_key_leads_to_the_key(flag):
    for name in filter(None, (flag.name, flag.short)):
        for wrong in {name, f"{flag.key.split('.')[0]}.{name}"} - set(all_keys()):
            assert nearest(wrong, all_keys()) == f" Did you mean {flag.key}?"


def test_merging_is_a_flag_as_well():
    expected = load_config(["lora.enabled=true", "lora.merge=true"])
    assert resolved("--use_lora", "--merge_lora") == resolved(USE_LORA="1", MERGE_LORA="true") == expected
    assert expected.lora.merge is True


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_help_shows_each_flag_with_the_default_it_has(flag):
    names = f"--{flag.short}, --{flag.name}" if flag.short else f"--{flag.name}"
    (line,) = [line for line in help_text().splitlines() if line.startswith(f"  {names} ")]
    ((shown, key),) = re.findall(r"\(default: (.*); ([\w.]+)\)$", line)
    assert key == flag.key
    default = get(load_config([]), key)
    if default is None:
        assert shown in ("none", "free", "the model's")
    else:
        assert yaml.safe_load(shown) == default or float(shown) == default


@pytest.mark.parametrize("word", ["--dry_run", "--config-path", "--config-name", "--help", "SFT_DEBUG", "conf/"])
def test_help_shows_what_else_there_is(word):
    assert word in help_text()


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
def test_override_over_flag_over_variable_over_config_yaml_over_conf(tmp_path, variable, flag, key):
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
def test_a_group_choice_is_an_override(words, environment):
    config = resolved(*words, **environment)
    assert (config.lora.enabled, config.lora.rank, config.lora.alpha) == (True, 16, 32)


def test_a_group_choice_leaves_flags_of_other_keys():
    config = resolved("lora=r16", "--lr", "1", "fsdp=fsdp2", STRATEGY="fsdp", BATCH_SIZE="6")
    assert (config.lora.rank, config.optim.lr, config.fsdp.strategy) == (16, 1, "fsdp2")
    assert config.data.train_batch_size == 6


def test_a_flag_over_a_choice_in_the_defaults_list(tmp_path):
    (tmp_path / "config.yaml").write_text(DEFAULTS.replace("lora: default", "lora: r16"))
    assert resolved(f"--config-path={tmp_path}").lora.rank == 16
    assert resolved(f"--config-path={tmp_path}", "--lora_rank=4").lora.rank == 4


def test_the_last_of_several_equal_flags_counts():
    assert resolved("--lr", "1", "--learning_rate", "2").optim.lr == 2


def test_overrides_stand_last_and_in_order_wherever_they_are_written():
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
def test_a_model_that_is_named_has_no_fallback(words, environment):
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
def test_a_switch_needs_no_value_and_takes_one(words, enabled):
    assert f"lora.enabled={str(enabled).lower()}" in [text.lower() for text in parse(words, {}).overrides]
    assert resolved(*words, USE_LORA="false" if enabled else "true").lora.enabled is enabled


@pytest.mark.parametrize("value", ["0", "false", "off", "no"])
def test_a_switch_in_the_environment_may_be_off(value):
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
    ],
)
def test_several_files_may_be_given(words, environment):
    config = resolved(*words, **environment)
    assert config == load_config(["data.train_files=[a.json,'b c.json','1_0']"])
    assert config.data.train_files == ["a.json", "b c.json", "1_0"]


@pytest.mark.parametrize("value", ["none", "None", "null"])
def test_none_takes_a_value_back(value):
    assert resolved("--resume_from", value, RESUME_FROM="auto").trainer.resume_from is None
    assert resolved("--val_data", value).data.val_files is None


def test_a_negative_number_is_a_value():
    assert parse(["--lr", "-1"], {}).overrides == ["optim.lr=-1"]


@pytest.mark.parametrize("words", [["--config-path", "/a b"], ["--config-path=/a b"], ["--config_path=/a b"]])
def test_the_place_of_config_yaml_is_handed_on(words):
    line = parse([*words, "--config-name", "c"], {})
    assert line.config_args == ["--config-path=/a b", "--config-name=c"]
    assert line.overrides == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--epoch", "3"], "unknown flag --epoch. Did you mean --epochs?"),
        (["--modle=x"], "unknown flag --modle. Did you mean --model?"),
        (["--batchsize", "2"], "unknown flag --batchsize. Did you mean --batch_size?"),
        (["--zzz"], "unknown flag --zzz. ./train.sh --help lists them."),
        (["--"], "unknown flag --."),
        (["--epochs"], "--epochs needs a value"),
        (["--epochs", "--lr", "1"], "--epochs needs a value"),
        (["--lr="], "needs a value"),
        (["--output_dir", ""], "--output_dir needs a value"),
        (["--train_data", ","], "--train_data needs a value"),
        (["--use_lora="], "--use_lora needs a value"),
        (["stray"], "cannot read 'stray'"),
        (["--epochs", "3", "4"], "cannot read '4'"),
        (["--use_lora", "perhaps"], "cannot read 'perhaps'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_told(words, says):
    assert says in error_of(*words)


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (["--epochs", "many"], {}, "trainer.total_epochs is 'many'"),
        ([], {"STRATEGY": "fdsp2"}, "Did you mean fsdp2?"),
        ([], {"USE_LORA": "perhaps"}, "lora.enabled is 'perhaps'"),
        ([], {"N_GPUS": "0"}, "trainer.n_gpus_per_node is 0"),
        (["--train_data", "none"], {}, "data.train_files is None"),
    ],
)
def test_a_bad_value_is_told_with_its_key(words, environment, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        resolved(*words, **environment)


# Any text survives

ODD = st.sampled_from(list("'\"\\$ {}=,[]()<>|&;*?~#@%!:/._-+^`0aZ")) | st.sampled_from(["${", "\\'", "你", "é", "1e5"])
PATHS = st.lists(ODD | st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12).map("".join)


@settings(max_examples=60, deadline=None)
@given(PATHS)
@example("C:\\new\\\\dir\\")
@example("a'b\"c")
@example("\\'")
@example("${HOME}/x")
@example("\\${x}\\\\${y}${")
@example("$HOME $(ls) `ls`")
@example(" a b ")
@example("2024_01_02")
@example("1.10")
@example("true")
@example("你好, 世界.json")
@example("a=b")
@example("[a,b]")
@example("{a: b}")
def test_any_path_comes_out_as_it_went_in(path):
    files = [part for part in path.split(",") if part]
    assume(files and not {path.lower(), *map(str.lower, files)} & {"none", "null", "???"})
    config = resolved(f"--train_data={path}", f"--output_dir={path}", VAL_DATA=path, RESUME_FROM=path)
    for found in (config.data.train_files, config.data.val_files):
        assert ([found] if isinstance(found, str) else found) == files
    assert config.trainer.output_dir == config.trainer.resume_from == path
    if not path.startswith("--"):
        assert parse(["--output_dir", path], {}) == parse([], {"OUTPUT_DIR": path})


# The command lines, frozen


PROGRAM = "-m sft_recipe.main_sft"
ONE = "torchrun --nnodes=1 --nproc_per_node=1 --standalone"
TWO = {"N_GPUS": "8", "NNODES": "2", "MASTER_ADDR": "192.168.1.1"}
TWO_OVERRIDES = "trainer.n_gpus_per_node=8 trainer.nnodes=2"


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ("", {}, f"{ONE} {PROGRAM}"),
        (
            "--use_lora --model Qwen/Qwen2.5-7B",
            {},
            f"{ONE} {PROGRAM} lora.enabled=true model.path=Qwen/Qwen2.5-7B",
        ),
        (
            "--model Qwen/Qwen2.5-7B --epochs 5 --lr 1e-5",
            {},
            f"{ONE} {PROGRAM} model.path=Qwen/Qwen2.5-7B trainer.total_epochs=5 optim.lr=1e-5",
        ),
        (
            "--batch_size 2 --micro_batch_size 1",
            {},
            f"{ONE} {PROGRAM} data.train_batch_size=2 data.micro_batch_size_per_gpu=1",
        ),
        (
            "--n_gpus 4",
            {},
            f"torchrun --nnodes=1 --nproc_per_node=4 --standalone {PROGRAM} trainer.n_gpus_per_node=4",
        ),
        ("--train_data /path/data.json", {}, f"{ONE} {PROGRAM} data.train_files=/path/data.json"),
        (
            "--resume_from ./outputs/checkpoints/step_1000",
            {},
            f"{ONE} {PROGRAM} trainer.resume_from=./outputs/checkpoints/step_1000",
        ),
        ("", {"WANDB_PROJECT": "my_sft"}, f"{ONE} {PROGRAM} trainer.wandb_project=my_sft"),
        (
            "--use_lora optim.lr_scheduler_type=linear lora=r16 fsdp=fsdp2",
            {},
            f"{ONE} {PROGRAM} lora.enabled=true optim.lr_scheduler_type=linear lora=r16 fsdp=fsdp2",
        ),
        (
            "",
            {**TWO, "NODE_RANK": "0"},
            "torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=192.168.1.1 --master_port=29500 "
            f"{PROGRAM} {TWO_OVERRIDES} trainer.node_rank=0 trainer.master_addr=192.168.1.1",
        ),
        (
            "",
            {**TWO, "NODE_RANK": "1"},
            "torchrun --nnodes=2 --nproc_per_node=8 --node_rank=1 --master_addr=192.168.1.1 --master_port=29500 "
            f"{PROGRAM} {TWO_OVERRIDES} trainer.node_rank=1 trainer.master_addr=192.168.1.1",
        ),
        (
            "",
            {**TWO, "NODE_RANK": "1", "MASTER_PORT": "29511"},
            "torchrun --nnodes=2 --nproc_per_node=8 --node_rank=1 --master_addr=192.168.1.1 --master_port=29511 "
            f"{PROGRAM} {TWO_OVERRIDES} trainer.node_rank=1 trainer.master_addr=192.168.1.1 trainer.master_port=29511",
        ),
        (
            "",
            {"MASTER_PORT": "29501"},
            "torchrun --nnodes=1 --nproc_per_node=1 --node_rank=0 --master_addr=localhost --master_port=29501 "
            f"{PROGRAM} trainer.master_port=29501",
        ),
    ],
)
def test_the_torchrun_command_is_this_one(words, environment, expected):
    assert torchrun(*shlex.split(words), **environment) == expected


def test_the_torchrun_command_hands_on_where_config_yaml_is(tmp_path):
    (tmp_path / "mine.yaml").write_text(DEFAULTS + "trainer: {n_gpus_per_node: 2}\n")
    assert torchrun(f"--config-path={tmp_path}", "--config-name=mine", "--lr=1") == (
        f"torchrun --nnodes=1 --nproc_per_node=2 --standalone {PROGRAM} "
        f"--config-path={tmp_path} --config-name=mine optim.lr=1"
    )


# Running


@pytest.fixture
def started(monkeypatch):
    """The torchrun arguments that would have been started; the exit code is 75."""
    calls: list[list[str]] = []

    def record(arguments):
        calls.append(arguments)
        return 75

    monkeypatch.setattr(local, "_torchrun", record)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return calls


def test_a_run_starts_torchrun_and_hands_its_exit_code_on(started):
    assert main(["--n_gpus", "2"]) == 75
    assert shlex.join(["torchrun", *started[0]]) == torchrun("--n_gpus", "2")
    assert len(started) == 1


@pytest.mark.parametrize("word", ["--dry_run", "--dry-run"])
def test_a_dry_run_prints_and_starts_nothing(started, capsys, tmp_path, word):
    words = ["--use_lora", "--output_dir", f"{tmp_path}/a b", "lora=r16"]
    assert main([word, *words]) == 0
    said, errors = capsys.readouterr()
    text, _, command = said.strip().rpartition("\n")
    assert started == [] and errors == "" and list(tmp_path.iterdir()) == []
    assert command == torchrun(*words)
    assert shlex.split(command)[-2:] == [f"trainer.output_dir='{tmp_path}/a b'", "lora=r16"]
    (tmp_path / "config.yaml").write_text(text)
    assert load_config([], tmp_path) == resolved(*words)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_prints_and_starts_nothing(started, capsys, word):
    assert main([word, "--epochs", "3"]) == 0
    assert capsys.readouterr().out == help_text() + "\n"
    assert started == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--epoch", "3"], "error: unknown flag --epoch. Did you mean --epochs?\n"),
        (["optim.lrr=3"], "error: unknown key optim.lrr. Did you mean optim.lr?\n"),
        (["--config-path=/nowhere"], "error: there is no /nowhere/config.yaml"),
        (["--dry_run", "--lora_rank", "0"], "error: the configuration has a mistake:\n  - lora.rank is 0;"),
    ],
)
def test_an_error_is_one_message_and_exit_code_2(started, capsys, monkeypatch, words, says):
    assert main(words) == 2
    said, errors = capsys.readouterr()
    assert errors.startswith(says) and said == "" and started == []
    monkeypatch.setenv("SFT_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(words)


def test_every_error_of_the_recipe_ends_this_way(monkeypatch, capsys):
    def fail(line):
        raise DataError("no data")

    monkeypatch.setattr(launch, "_launch", fail)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: no data\n"


def test_what_is_not_the_users_fault_is_not_hidden(monkeypatch):
    monkeypatch.setattr(launch, "_launch", lambda line: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main([])


@pytest.mark.parametrize(
    ("codes", "expected", "says"),
    [
        ([2], 2, ""),
        ([75, 75], 75, ""),
        ([1], 1, ""),
        ([-15, 2], 2, ""),
        ([-15, -15, 75], 75, ""),
        ([-9], 137, "error: rank 0 of this machine was killed by SIGKILL (out of memory?)\n"),
        ([-15, -11], 139, "error: rank 1 of this machine was killed by SIGSEGV\n"),
        ([1, -9], 137, "error: rank 1 of this machine was killed by SIGKILL (out of memory?)\n"),
        ([1, (-9, 30)], 1, ""),  # by torchrun, since it did not end by itself after rank 0 had failed
        ([-15, -15], 143, ""),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_by_itself(capsys, codes, expected, says):
    failures = {}
    for rank, code in enumerate(codes):
        code, later = code if isinstance(code, tuple) else (code, 0)
        failures[rank] = SimpleNamespace(local_rank=rank, exitcode=code, timestamp=1000 + later)
    assert local._exit_code(failures) == expected
    assert capsys.readouterr().err == says


def test_ranks_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    for ranks, threads in [(1, "8"), (3, "2"), (16, "1")]:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        local._set_threads(ranks)
        assert local.os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    local._set_threads(1)
    assert local.os.environ["OMP_NUM_THREADS"] == "5"


# train.sh itself


def test_train_sh_prints_help_from_anywhere_and_without_an_environment(tmp_path):
    nothing_installed = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [str(HOME / "train.sh"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=nothing_installed, text=True, capture_output=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, help_text() + "\n", "")


def test_train_sh_hands_words_and_environment_on(tmp_path):
    words = ["--train_data", "a b.json", "实验 'x'.json", "--output_dir", str(tmp_path / "out"), "lora=r16"]
    done = runs.launch("--dry_run", *words, BATCH_SIZE="6")
    assert done.returncode == 0, done.stderr
    text, _, command = done.stdout.strip().rpartition("\n")
    assert command == torchrun(*words, BATCH_SIZE="6")
    assert yaml.safe_load(text) == resolved(*words, BATCH_SIZE="6").model_dump(mode="json")
    assert list(tmp_path.iterdir()) == []


def test_train_sh_ends_a_typo_with_code_2_and_one_line():
    done = runs.launch("--epoch", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --epoch. Did you mean --epochs?\n"


@pytest.mark.parametrize("given, handed_on", [({}, "glibc.malloc.tcache_count=0"), ({"GLIBC_TUNABLES": "x=1"}, "x=1")])
def test_on_a_cpu_threads_keep_no_small_pieces_of_memory(tmp_path, given, handed_on):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$GLIBC_TUNABLES"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(tmp_path), **given}
    done = subprocess.run([HOME / "train.sh"], env=environment, text=True, capture_output=True, timeout=600)
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    assert done.stdout.splitlines()[-1] == (given.get("GLIBC_TUNABLES", "") if has_gpu else handed_on)
