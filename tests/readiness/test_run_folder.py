"""check_sft_ready.py and a start say the same of a run folder and of the checkpoint that a run resumes from."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from sft_recipe.cli import check
from sft_recipe.language import plural
from sft_recipe.readiness import machine, plan
from sft_recipe.training.schedule import Schedule
from tests.support import tiny
from tests.support.composing import load_config
from tests.support.runs import run_here
from tests.support.small_run import arguments


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, another one, and a run in `out` with the checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run_folder")
    tiny.build_model(folder / "model")
    tiny.build_model(folder / "other", seed=1)
    (folder / "circle").symlink_to("circle")
    tiny.build_tokenizer().save_pretrained(folder / "learned")
    sizes = dict(n_positions=16, n_embd=16, n_layer=1, n_head=2, vocab_size=len(tiny.build_tokenizer()))
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder / "learned")
    run = arguments(folder / "model", folder, "trainer.total_training_steps=4", "trainer.max_ckpt_to_keep=null")
    assert run_here(*run) == 0
    return folder


@pytest.fixture
def both(work, tmp_path, capfd, monkeypatch):
    """Return a function: the errors of the check, its report, and the error of a start, with a copy of the run."""
    monkeypatch.setattr(machine, "SLOW_DISK", 0)
    shutil.copytree(work / "out", tmp_path / "out", symlinks=True)

    def run(*words):
        usual = arguments(work / "model", work, f"trainer.output_dir={tmp_path}/out", "trainer.total_training_steps=4")
        before = everything(tmp_path)
        code = check.main(["--json", *usual, *words])
        report = json.loads(capfd.readouterr().out)["checks"]
        assert everything(tmp_path) == before  # the check changes nothing
        errors = [item["message"] for item in report if item["status"] == "error"]
        assert code == (2 if errors else 0)
        start = run_here(*usual, *words)
        message = capfd.readouterr().err.partition("error: ")[2].strip()
        assert start == (2 if message else 0)
        return errors, report, message

    return run


def everything(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["trainer.resume_from=auto", "trainer.seed=1"], "belongs to another run"),
        (["trainer.resume_from=auto", "data.train_batch_size=3"], "data.train_batch_size: 4 in the checkpoint, 3 now"),
        (["trainer.resume_from=auto", "data.train_files={work}/val.json"], "examples: 18 in the checkpoint, 4 now"),
        (["trainer.resume_from=auto", "model.path={work}/other"], "model.weights: "),
        (["trainer.resume_from=auto", "lora.enabled=true"], "lora: off in the checkpoint, rank 8"),
        (["trainer.resume_from={out}/checkpoints/step_2"], "holds step_4, newer than step_2"),
        (["trainer.resume_from={work}/out/checkpoints/step_2"], "holds step_4 of another run"),
        (["trainer.resume_from={out}"], "is a folder of checkpoints"),
        (["trainer.resume_from={work}/circle"], "there is no checkpoint"),
        (["trainer.resume_from={work}/" + 300 * "x"], "there is no checkpoint"),
        (["trainer.output_dir={work}/" + 300 * "x"], "cannot be written: File name too long"),
        (["trainer.output_dir={out}/new", "fsdp.ulysses_sequence_parallel_size=2"], "1 rank cannot be grouped by 2"),
        (
            [
                "trainer.output_dir={out}/new",
                "trainer.early_stopping.metric=eval/tool_match",
                "trainer.early_stopping.patience=2",
                "eval.generate=2",
            ],
            "no answer of the data calls a tool",
        ),  # fmt: skip
        (["trainer.output_dir={out}/new", "model.path={work}/learned"], "has embeddings for 16 positions only"),
        ([], "holds step_4 of an earlier run"),
        (["trainer.output_dir={work}/train.json"], "train.json cannot be written: Not a directory"),
        (["trainer.output_dir={work}/train.json/a/b"], "b cannot be written: Not a directory"),
        (["trainer.output_dir={out}/new", "data.cache_dir={work}/val.json"], "token store cannot be written to"),
        (["trainer.output_dir={out}/new", "data.cache_dir=/proc/a"], "token store cannot be written to /proc/a"),
        (["trainer.output_dir={out}/new", "trainer.logger=[wandb]"], "trainer.logger names wandb"),
        (["trainer.output_dir={out}/new", "trainer.logger=[swanlab]"], "trainer.logger names swanlab"),
    ],
)
def test_check_refuses_what_a_start_refuses(both, work, tmp_path, monkeypatch, words, text):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    errors, _, message = both(*(word.format(work=work, out=tmp_path / "out") for word in words))
    assert text in message and errors == [message]


@pytest.mark.parametrize("name", ["best", "step_4", "step_9"])
def test_check_reads_the_checkpoint_that_a_start_reads(both, tmp_path, name):
    folder = tmp_path / "out/checkpoints"
    spec = "auto"
    if name == "best":
        (folder / "best").unlink(missing_ok=True)
        shutil.copytree(folder / "step_2", folder / "best")
        flip(folder / "best/manifest.json")
    elif name == "step_4":
        spec = folder / "step_4"
        flip(next((folder / "step_4/state").glob("*.safetensors")))
    else:
        shutil.copytree(folder / "step_4", folder / "step_9")
    errors, _, message = both(f"trainer.resume_from={spec}")
    assert f"{folder}/{name}" in message and errors == [message]


def test_a_damaged_checkpoint_that_a_start_leaves_out_is_a_warning(both, tmp_path):
    newest = tmp_path / "out/checkpoints/step_4"
    flip(next((newest / "state").glob("*.safetensors")))
    errors, report, message = both("trainer.resume_from=auto")
    warning, resumed = (item for item in report if item["name"] == "run folder")
    assert not errors and not message and warning["status"] == "warning"
    assert resumed["message"] == f"the run continues {newest.with_name('step_2')}"
    assert warning["message"].startswith(f"{newest} is damaged: ") and warning["message"].endswith(
        "A start renames it."
    )
    assert newest.with_name("damaged_step_4").is_dir()


def test_a_run_that_can_be_resumed_is_ready_and_counts_what_is_left(both, tmp_path):
    words = ["trainer.total_training_steps=7", "trainer.save_freq=2", "trainer.max_ckpt_to_keep=1"]
    _, new, _ = both(*words, f"trainer.output_dir={tmp_path}/new")
    errors, report, message = both(*words, "trainer.resume_from=auto")
    assert not errors and not message
    whole, rest = ({item["name"]: item for item in items} for items in (new, report))
    assert "run folder" not in whole
    assert rest["run folder"]["message"] == f"the run continues {tmp_path}/out/checkpoints/step_4"
    assert whole["steps"]["message"].startswith("7 steps (")
    assert rest["steps"]["message"].startswith("3 of 7 steps left (")
    tokens = [
        int(re.search(r"([\d,]+) tokens", items["steps"]["message"])[1].replace(",", "")) for items in (whole, rest)
    ]
    assert tokens[0] * 3 / 7 == pytest.approx(tokens[1], abs=1)
    assert rest["steps"]["remedy"] == "a larger trainer.total_training_steps"
    # steps 2, 4 and 6 are saved, and 7; the one kept, the best one and the one being written make 3
    assert whole["disk"]["message"].startswith("up to 3 checkpoints more at a time")
    assert rest["disk"]["message"].startswith("up to 2 checkpoints more at a time")  # 6 and 7: 4 may stay, 2 are there


def test_changed_settings_of_a_resumed_run_are_a_warning(both):
    errors, report, message = both("trainer.resume_from=auto", "optim.lr=0.5", "trainer.total_training_steps=5")
    [changed] = [item for item in report if item["name"] == "run folder" and item["status"] == "warning"]
    assert not errors and not message
    assert changed["message"].startswith("settings that differ from those of the run so far: optim.lr=0.5 (before: ")


def test_a_checkpoint_may_be_named_from_its_folder(both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "out/checkpoints")
    words = ["trainer.resume_from=step_4", "optim.lr=0.5", f"trainer.output_dir={tmp_path}/new"]
    errors, report, message = both(*words, "trainer.total_training_steps=5")
    said = [item["message"] for item in report if item["name"] == "run folder"]
    assert not errors and not message and said[0] == "the run continues step_4"
    assert said[1].startswith("settings that differ from those of the run so far: optim.lr=0.5 (before: ")


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["trainer.total_training_steps=4"], "the checkpoint is at step 4 of 4", "a larger trainer.total_training"),
        (["trainer.total_training_steps=3"], "the checkpoint is at step 4 of 3", "a larger trainer.total_training"),
        (
            ["trainer.total_training_steps=null", "trainer.total_epochs=9", "trainer.early_stopping.target=1000"],
            "the run stopped early after step 4: val/loss is ",
            "a larger trainer.early_stopping.patience",
        ),
    ],
)
def test_a_run_with_nothing_left_to_train_is_said_to_have_nothing_left(both, words, message, remedy):
    errors, report, error = both("trainer.resume_from=auto", *words)
    [steps] = [item for item in report if item["name"] == "steps"]
    assert not errors and not error and steps["status"] == "warning"
    assert steps["message"].startswith(f"nothing is left to train: {message}") and steps["remedy"].startswith(remedy)
    assert next(item for item in report if item["name"] == "disk")["message"].startswith("up to 0 checkpoints more")


@pytest.mark.parametrize(
    ("words", "most", "status"),
    [
        (["trainer.save_freq=-1", "trainer.test_freq=-1"], 1, "ok"),
        (["trainer.save_freq=-1", "trainer.test_freq=2"], 5, "warning"),  # 2, 4, 5 (an epoch), 6 and 7
        (["trainer.save_freq=-1", "trainer.test_freq=2", "trainer.save_best=false"], 1, "ok"),
        (["trainer.save_freq=2", "trainer.test_freq=-1"], 4, "error"),  # 2, 4, 6 and 7
        (["trainer.save_freq=3", "trainer.test_freq=2"], 6, "error"),  # 2, 3, 4, 5, 6 and 7
        (["trainer.save_freq=3", "trainer.test_freq=2", "trainer.max_ckpt_to_keep=1"], 3, "error"),
    ],
)
def test_the_disk_has_room_for_the_checkpoints_that_evaluations_find_best(monkeypatch, words, most, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(2.5 * 16e6)))
    config = load_config(["data.val_ratio=0.1", "trainer.max_ckpt_to_keep=null", *words])
    stats = SimpleNamespace(total=10**6, trainable=10**6)
    [disk] = plan.disk_checks(config, stats, Schedule(steps_per_epoch=5, total_steps=7), plan.Done())
    assert disk.status == status and disk.message("en").startswith(f"up to {plural(most, 'checkpoint')} more at a time")


def test_another_machine_is_not_asked_about_checkpoints(work, capfd):
    words = arguments(work / "model", work, "trainer.resume_from=auto", "trainer.total_training_steps=7")
    check.main(["--json", *words, "--gpus=2", "--gpu_memory=24GB"])
    checks = {item["name"]: item for item in json.loads(capfd.readouterr().out)["checks"]}
    assert checks["run folder"]["status"] == "warning" and "not looked at" in checks["run folder"]["message"]
    assert checks["steps"]["message"].startswith("7 steps (") and "free" not in checks["disk"]["message"]
