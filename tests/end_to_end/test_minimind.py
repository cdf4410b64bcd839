"""MiniMind's own trainer and this program compute the same losses, gradient norms and learning rates, step by step."""

import json
import shutil

import pytest

from tests.support.runs import launch, metrics, run_here
from tests.support.shared import shared_data

STEPS = 40
WEIGHTS = {"minimind": "pretrain_64.pth", "minimind_moe": "pretrain_64_moe.pth"}


def trace(name):
    return json.loads((shared_data(name) / "trace.json").read_text())


def arguments(name, output, *extra):
    folder, settings = shared_data(name), trace(name)["settings"]
    return [
        f"model.path={folder / WEIGHTS[name]}",
        f"model.tokenizer_path={shared_data('minimind') / 'tokenizer'}",
        f"data.train_files={folder}/tokens.jsonl",
        f"data.cache_dir={output.parent}/cache",
        "data.order=file",
        f"data.train_batch_size={settings['batch_size']}",
        f"data.max_length={settings['max_seq_len']}",
        f"data.micro_batch_size_per_gpu={settings['batch_size']}",
        "trainer.total_epochs=1",  # the file has the rows of both epochs
        f"trainer.output_dir={output}",
        "trainer.device=cpu",
        "trainer.save_freq=-1",
        "fsdp.mixed_precision.param_dtype=fp32",
        f"optim.lr={settings['learning_rate']}",
        f"optim.weight_decay={settings['weight_decay']}",
        "optim.min_lr_ratio=0.1",
        "optim.lr_warmup_steps_ratio=0",
        "optim.zero_indexed_step=false",
        *extra,
    ]


def check(output, name):
    rows, expected = metrics(output), trace(name)["steps"]
    assert len(rows) == len(expected) == STEPS
    for row, step in zip(rows, expected, strict=True):
        assert row["train/loss"] == pytest.approx(step["loss"], abs=1e-4), row["step"]
        assert row["train/grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-3), row["step"]
        assert row["train/lr"] == pytest.approx(step["lr"], rel=1e-9), row["step"]


AUX_OFF = {"minimind": [], "minimind_moe": ["model.router_aux_loss_coef=0"]}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_those_of_minimind(warm, tmp_path, name, ranks):
    end = warm.run(arguments(name, tmp_path / "out", *AUX_OFF[name]), ranks=ranks)
    assert end.code == 0, end.output
    check(tmp_path / "out", name)


@pytest.mark.parametrize("name", WEIGHTS)
def test_losses_are_those_of_minimind_where_the_run_is_resumed_in_the_middle(tmp_path, name):
    output = tmp_path / "out"
    saving = arguments(name, output, *AUX_OFF[name], "trainer.save_freq=20", "trainer.max_ckpt_to_keep=null")
    assert run_here(*saving) == 0
    shutil.rmtree(output / "checkpoints/step_40")
    assert run_here(*saving, "trainer.resume_from=auto") == 0
    check(output, name)


def test_router_loss_is_that_of_minimind(tmp_path):
    """MiniMind counts padding to 256 tokens in it, this program does not: hence the tolerance."""
    expected = trace("minimind_moe")["first_step_with_aux"]
    extra = [f"optim.lr={expected['learning_rate']}", "trainer.total_training_steps=1"]
    assert run_here(*arguments("minimind_moe", tmp_path / "out", *extra)) == 0
    [row] = metrics(tmp_path / "out")
    assert row["train/loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert row["train/aux_loss"] == pytest.approx(expected["aux_loss"], abs=1e-4)
    assert row["train/grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_command_of_a_user_who_moves_gives_the_losses_of_minimind(tmp_path):
    folder, settings = shared_data("minimind"), trace("minimind")["settings"]
    command = ["--recipe", "minimind", "--model", f"{folder}/pretrain_64.pth", "--train_data", f"{folder}/tokens.jsonl"]
    command += ["--tokenizer_path", f"{folder}/tokenizer", "--batch_size", "4", "--epochs", "1", "--max_length", "256"]
    command += ["--lr", str(settings["learning_rate"]), "data.order=file", "fsdp.mixed_precision.param_dtype=fp32"]
    own = [f"data.cache_dir={tmp_path}/cache", f"trainer.output_dir={tmp_path}/out", "trainer.device=cpu"]
    done = launch(*command, *own)
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path / "out", "minimind")
