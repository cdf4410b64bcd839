"""train.sh starts the ranks of a composed configuration; errors are one message; the torchrun commands are frozen."""

import logging
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from sft_recipe import FORMAT_VERSION
from sft_recipe.cli import train
from sft_recipe.cli.flags import parse
from sft_recipe.cli.train import main
from sft_recipe.config.compose import HOME, load_config, load_for_rank
from sft_recipe.errors import DataError
from sft_recipe.launch import local
from sft_recipe.launch.local import HEAP_SETTINGS, torchrun_args
from tests.cli.test_flags import resolved
from tests.support import runs
from tests.support.composing import DEFAULTS


def torchrun(*args, **environment):
    """The torchrun command of a command line, as one line of shell."""
    line = parse(list(args), environment)
    arguments = [*line.config_args, *line.overrides]
    return shlex.join(["torchrun", *torchrun_args(load_for_rank(arguments).trainer, arguments)])


def test_bitsandbytes_does_not_warn_about_itself(monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.NOTSET)
    assert main(["--dry_run", "optim.optimizer=AdamW8bit", "optim.optimizer_impl=bitsandbytes.optim"]) == 0
    assert logging.getLogger("bitsandbytes").level == logging.ERROR and not capsys.readouterr().err


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
def test_torchrun_command_is_frozen(words, environment, expected):
    assert torchrun(*shlex.split(words), **environment) == expected


def test_torchrun_command_has_config_path_and_name(tmp_path):
    (tmp_path / "mine.yaml").write_text(DEFAULTS + "trainer: {n_gpus_per_node: 2}\n")
    assert torchrun(f"--config-path={tmp_path}", "--config-name=mine", "--lr=1") == (
        f"torchrun --nnodes=1 --nproc_per_node=2 --standalone {PROGRAM} "
        f"--config-path={tmp_path} --config-name=mine optim.lr=1"
    )


# Running


@pytest.fixture
def started(monkeypatch):
    """Record the arguments and the resolved configuration that torchrun would start with; its exit code is 75."""
    calls = []

    def record(arguments):
        path = Path(arguments[-1].partition("=")[2])
        modes = [oct(file.stat().st_mode & 0o777) for file in (path, path.parent)]
        calls.append((arguments, modes, load_for_rank(arguments[-1:])))
        return 75

    monkeypatch.setattr(local, "_torchrun", record)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return calls


def test_ranks_get_the_composed_configuration_in_a_private_file(started):
    words = ["--n_gpus", "2", "--use_lora", "trainer.heartbeat_timeout=inf", "optim.betas=[0.8,0.9]"]
    assert main(words) == 75
    ((arguments, modes, config),) = started
    *expected, _ = torchrun_args(config.trainer, [""])
    assert arguments[:-1] == expected and arguments[-1].startswith("--resolved-config=")
    assert config == resolved(*words)
    assert modes == ["0o600", "0o700"]
    assert not Path(arguments[-1].partition("=")[2]).parent.exists()


@pytest.mark.parametrize("word", ["--dry_run", "--dry-run"])
def test_dry_run_prints_and_starts_nothing(started, capsys, tmp_path, word):
    words = ["--use_lora", "--output_dir", f"{tmp_path}/a b", "lora=r16"]
    assert main([word, *words]) == 0
    output, errors = capsys.readouterr()
    text, _, command = output.strip().rpartition("\n")
    assert started == [] and errors == "" and list(tmp_path.iterdir()) == []
    assert command == torchrun(*words)
    assert shlex.split(command)[-2:] == [f"trainer.output_dir='{tmp_path}/a b'", "lora=r16"]
    (tmp_path / "config.yaml").write_text(text)
    assert load_config([], tmp_path) == resolved(*words)


def test_dry_run_prints_no_secret(started, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    words = ["--wandb_project", "hf_0123456789/${x}", "model.override_config={key: hf_0123456789}"]
    assert main(["--dry_run", *words]) == 0
    output = capsys.readouterr().out
    assert "hf_0123456789" not in output
    arguments = shlex.split(output.strip().splitlines()[-1])[-2:]
    assert load_config(arguments) == resolved(*words)


def test_ranks_inherit_the_language(started, monkeypatch):
    monkeypatch.setenv("SFT_LANG", "en")
    assert main(["--n_gpus", "2", "--lang", "zh_CN"]) == 75
    assert os.environ["SFT_LANG"] == "zh"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_prints_and_starts_nothing(started, capsys, word):
    with pytest.raises(SystemExit) as end:
        main(["--epochs", "3", word])
    assert end.value.code == 0 and started == []
    assert capsys.readouterr().out.startswith("usage: ./train.sh")


@pytest.mark.parametrize(
    ("words", "expected_text"),
    [
        (["--epoch", "3"], "error: unknown flag --epoch. Did you mean --epochs?\n"),
        (["--lang", "tlh"], "error: --lang 'tlh': there is no text in this language;"),
        (["optim.lrr=3"], "error: unknown key optim.lrr. Did you mean optim.lr?\n"),
        (["--config-path=/nowhere"], "error: there is no /nowhere/config.yaml"),
        (["--dry_run", "--lora_rank", "0"], "error: the configuration has a mistake:\n  - lora.rank is 0;"),
        (
            ["--dry_run", "trainer.logger=[foo]"],
            "error: the configuration has a mistake:\n  - trainer.logger is 'foo';",
        ),
        (["--dry_run", "trainer.save_freq=0"], "error: the configuration has a mistake:\n  - trainer.save_freq is 0;"),
        (["--dry_run", "--resume_from", "nope"], "error: there is no checkpoint nope"),
        (["--dry_run", "optim.optimizer=Foo"], "error: optim.optimizer: torch.optim has no optimizer Foo;"),
        (
            ["--dry_run", "model.share_prefixes=true", "model.attn_implementation=sdpa"],
            "error: model.share_prefixes=true needs model.attn_implementation=sft_packed",
        ),
        (
            ["--dry_run", "--n_gpus=2", "fsdp.ulysses_sequence_parallel_size=2", "model.attn_implementation=eager"],
            "error: fsdp.ulysses_sequence_parallel_size=2 needs model.attn_implementation=sft_packed",
        ),
        (["--dry_run", "--n_gpus", "8"], "error: BATCH_SIZE=4 is smaller than the number of ranks (8)"),
    ],
)
def test_error_is_one_message_and_exit_code_2(started, capsys, monkeypatch, words, expected_text):
    assert main(words) == 2
    output, errors = capsys.readouterr()
    assert errors.startswith(expected_text) and output == "" and started == []
    monkeypatch.setenv("SFT_DEBUG", "1")
    assert main(words) == 2
    assert "Traceback" in (errors := capsys.readouterr().err) and expected_text in errors


def test_every_recipe_error_is_reported(monkeypatch, capsys):
    def fail(line):
        raise DataError("no data")

    monkeypatch.setattr(train, "_launch", fail)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: no data\n"


def test_unexpected_error_is_raised(monkeypatch):
    monkeypatch.setattr(train, "_launch", lambda line: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main([])


# train.sh itself


def test_train_sh_prints_help_without_an_environment(tmp_path):
    nothing_installed = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [str(HOME / "train.sh"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=nothing_installed, text=True, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ./train.sh") and "--batch_size" in done.stdout


def test_train_sh_passes_arguments_and_environment(tmp_path):
    words = ["--train_data", "a b.json", "实验 'x'.json", "--output_dir", str(tmp_path / "out"), "lora=r16"]
    done = runs.launch("--dry_run", *words, BATCH_SIZE="6")
    assert done.returncode == 0, done.stderr
    text, _, command = done.stdout.strip().rpartition("\n")
    assert command == torchrun(*words, BATCH_SIZE="6")
    expected = resolved(*words, BATCH_SIZE="6").model_dump(mode="json")
    assert yaml.safe_load(text) == {"format_version": FORMAT_VERSION} | expected
    assert list(tmp_path.iterdir()) == []


def test_train_sh_reports_a_typo_in_one_line():
    done = runs.launch("--epoch", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --epoch. Did you mean --epochs?\n"


@pytest.mark.parametrize(
    "given, handed_on", [({}, HEAP_SETTINGS["GLIBC_TUNABLES"]), ({"GLIBC_TUNABLES": "x=1"}, "x=1")]
)
def test_train_sh_lets_all_threads_share_one_heap_on_cpus(tmp_path, given, handed_on):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$GLIBC_TUNABLES"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(tmp_path), **given}
    done = subprocess.run([HOME / "train.sh"], env=environment, text=True, capture_output=True, timeout=600)
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    assert done.stdout.splitlines()[-1] == (given.get("GLIBC_TUNABLES", "") if has_gpu else handed_on)
