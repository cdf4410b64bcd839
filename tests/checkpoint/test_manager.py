"""What a checkpoint promises: damage is found and named, the one before is used, and what counts is never removed."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sft_recipe import files
from sft_recipe.checkpoint.manager import quarantine
from sft_recipe.checkpoint.manifest import read_manifest, verify, write_manifest
from sft_recipe.checkpoint.resume import resumed_identity
from sft_recipe.engine.cpu.platform import use_cpu
from tests.support import tiny
from tests.support.chaos import states, wrap
from tests.support.runs import metrics, run_here
from tests.support.small_run import STEPS, arguments, checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A run with checkpoints step_2 and step_4; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved")
    assert run_here(*arguments(model, folder, "trainer.total_training_steps=4")) == 0
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def edit_manifest(path):
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("state/*.safetensors", cut, "bytes instead of"),
        ("state/*.safetensors", flip, "does not have its checksum"),
        ("state/*.safetensors", remove, "is missing"),
        ("huggingface/model.safetensors", flip, "does not have its checksum"),
        ("manifest.json", remove, "no readable manifest.json"),
        ("manifest.json", cut, "no readable manifest.json"),
        ("manifest.json", edit_manifest, "has changed since it was written"),
    ],
)
def test_damaged_newest_checkpoint_is_quarantined_and_the_previous_one_used(
    model, saved, tmp_path, capfd, file, damage, says
):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder, symlinks=True)
    newest = folder / "out/checkpoints/step_4"
    damage(next(newest.glob(file)))
    run = arguments(model, folder, "trainer.total_training_steps=4")
    capfd.readouterr()
    assert run_here(*run, f"trainer.resume_from={newest}") == 2
    assert says in capfd.readouterr().err
    assert run_here(*run, "trainer.resume_from=auto") == 0
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert says in said and "after step 2" in said and "renamed to damaged_step_4" in said
    assert checkpoints(folder) == ["damaged_step_4", "step_2", "step_4"]
    assert [row["step"] for row in metrics(folder / "out")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "content",
    ["", "null", "[1]", "[" * 99_999, '{"format_version": Infinity}', '{"format_version": [1]}', "{}"]
    + [os.mkfifo, Path.mkdir],
)
def test_manifest_of_something_else_is_not_readable(tmp_path, content):
    """No checkpoint is found there, and no identity of a run."""
    path = tmp_path / "step_4/manifest.json"
    path.parent.mkdir()
    if isinstance(content, str):
        path.write_text(content)
    else:
        content(path)
    with pytest.raises(ValueError, match="it has no readable manifest.json"):
        read_manifest(tmp_path / "step_4")
    assert resumed_identity("auto", tmp_path, is_restart=False) == {}


def test_damaged_checkpoints_of_the_same_step_are_all_kept(tmp_path):
    for content in "abc":
        (tmp_path / "step_4").mkdir()
        (tmp_path / "step_4/file").write_text(content)
        quarantine(tmp_path / "step_4")
    kept = {path.parent.name: path.read_text() for path in tmp_path.glob("*/file")}
    assert kept == {"damaged_step_4": "a", "damaged_step_4_2": "b", "damaged_step_4_3": "c"}


@pytest.mark.parametrize("identity", [None, 7])
def test_manifest_without_an_identity_has_none(tmp_path, identity):
    (tmp_path / "step_4").mkdir()
    write_manifest(tmp_path / "step_4", {"step": 4, "identity": identity}, {})
    assert resumed_identity("auto", tmp_path, is_restart=False) == {}


@pytest.mark.parametrize("name", ["another.safetensors", "._shard.safetensors"])
def test_foreign_tensors_beside_the_state_are_named_and_nothing_is_renamed(model, saved, tmp_path, capfd, name):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder, symlinks=True)
    newest = folder / "out/checkpoints/step_4"
    shutil.copy(next(newest.glob("state/*.safetensors")), newest / "state" / name)
    capfd.readouterr()
    for resume in (newest, "auto"):
        assert run_here(*arguments(model, folder, f"trainer.resume_from={resume}")) == 2
        said = capfd.readouterr().err
        assert f"state/{name} is no file of this checkpoint" in said and "Traceback" not in said
    assert checkpoints(folder) == ["step_2", "step_4"]


def fail_reads(monkeypatch, call, name, number, times):
    """Let the first `times` calls of Path.open or Path.stat of a file of step_4 fail."""
    real, left = getattr(Path, call), [times]

    def failing(self, *args, **kwargs):
        if self.match(f"step_4/{name}") and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(files, "RETRY_DELAYS_S", (0.0,) * 4)
    monkeypatch.setattr(Path, call, failing)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize(
    ("call", "name"), [("open", "manifest.json"), ("open", "state/*.safetensors"), ("stat", "state/*.safetensors")]
)
def test_read_error_is_retried_and_is_no_damage(model, saved, tmp_path, capfd, monkeypatch, call, name, number):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder, symlinks=True)
    run = arguments(model, folder, "trainer.total_training_steps=4", "trainer.resume_from=auto")
    with monkeypatch.context() as patch:
        fail_reads(patch, call, name, number, times=10**6)
        assert run_here(*run) == 2
    error = capfd.readouterr().err
    assert f"cannot be read: {os.strerror(number)}" in error and "step_4" in error and "Traceback" not in error
    assert checkpoints(folder) == ["step_2", "step_4"]
    fail_reads(monkeypatch, call, name, number, times=4)
    assert run_here(*run) == 0
    assert checkpoints(folder) == ["step_2", "step_4"]
    assert "step_4 is at step 4 of 4" in capfd.readouterr().out


def list_own_files_only(rank: int) -> None:
    """A setup: rank 0 does not list yet what rank 1 has written, and rank 1 lists nothing."""
    from sft_recipe.checkpoint import manager

    real = manager.list_files
    manager.list_files = lambda folder: [] if rank else [name for name in real(folder) if "shard-00002" not in name]


def lose_file(rank: int) -> None:
    """A setup: what rank 1 writes in its second save is not there afterwards."""
    from sft_recipe.checkpoint.writer import ShardWriter

    def lose(writer, *_):
        if ".step_4" in os.path.realpath(writer.folder):
            next(writer.folder.glob("shard-00002*")).unlink()

    if rank == 1:
        wrap(ShardWriter, "write_data", after=lose)


def test_manifest_has_all_files_whatever_a_rank_lists(warm, model, tmp_path):
    run = arguments(model, tmp_path, "trainer.total_training_steps=2")
    end = warm.run(run, ranks=2, setup=(f"{__name__}:list_own_files_only", {}))
    assert end.code == 0, end.output
    newest = tmp_path / "out/checkpoints/step_2"
    there = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert sum("shard-00002" in name for name in there) == 1
    assert there == {*read_manifest(newest)["files"], "manifest.json"}


def test_checkpoint_that_lacks_a_written_file_is_not_complete(warm, model, tmp_path):
    run = arguments(model, tmp_path, "trainer.total_training_steps=4")
    end = warm.run(run, ranks=2, setup=(f"{__name__}:lose_file", {}))
    assert end.code == 2 and "step 4 cannot be saved" in end.output and "shard-00002" in end.output, end.output
    assert checkpoints(tmp_path) == ["step_2"]


def test_manifest_describes_the_checkpoint(saved):
    newest = saved / "out/checkpoints/step_4"
    manifest = read_manifest(newest)
    there = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert there == {*manifest["files"], "manifest.json"}
    assert manifest["step"] == 4 and manifest["world_size"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"config", "identity", "evaluation", "early_stopping"} <= manifest.keys()
    assert verify(newest) == ""


def test_exported_model_equals_the_stored_state(saved):
    newest = saved / "out/checkpoints/step_4"
    model = load_file(newest / "huggingface/model.safetensors")
    state = {name: value for (_, name), value in states(newest).items()}
    assert model and all(value.equal(state[f"model.{name}"]) for name, value in model.items())


@pytest.mark.parametrize("beside", ["false", "true"])
def test_checkpoint_that_is_not_on_the_disk_as_written_is_found_and_saved_again(
    model, tmp_path, monkeypatch, capfd, beside
):
    """A byte changes after the checkpoint is complete, before it is read back; the one before it is not pruned."""
    use_cpu()
    from sft_recipe.checkpoint.manager import Checkpoints

    real = Checkpoints.read_back

    def read_back(self, checkpoint):
        if checkpoint.name == "step_4":
            flip(next(checkpoint.glob("state/*.safetensors")))
        real(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "read_back", read_back)
    keep = ["trainer.max_ckpt_to_keep=1", f"trainer.async_save={beside}"]
    assert run_here(*arguments(model, tmp_path, *keep, "trainer.total_training_steps=5")) == 0
    said = capfd.readouterr().out
    assert said.count("WARNING") == 1 and "step_4 is not as it was written" in said
    assert "does not have its checksum" in said
    assert checkpoints(tmp_path) == ["damaged_step_4", "step_5"]
    assert verify(tmp_path / "out/checkpoints/step_5") == ""


def test_last_checkpoint_that_cannot_be_read_back_fails_the_run_and_keeps_the_others(
    model, tmp_path, monkeypatch, capfd
):
    use_cpu()
    from sft_recipe.checkpoint import manager

    real = manager.compare

    def failing(path, files, from_disk=False):
        if "step_4" in os.path.realpath(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path / "state"))
        return real(path, files, from_disk)

    monkeypatch.setattr(manager, "compare", failing)
    run = arguments(model, tmp_path, "trainer.max_ckpt_to_keep=1", "trainer.total_training_steps=4")
    assert run_here(*run) == 2
    error = capfd.readouterr().err
    assert "Input/output error" in error and "checkpoints/step_4/state" in error and "Traceback" not in error
    assert checkpoints(tmp_path) == ["step_2", "step_4"]


def test_checkpoint_with_the_lowest_validation_loss_is_kept(model, tmp_path, monkeypatch):
    """By validation loss, which here is lowest after the second step."""
    from sft_recipe.evaluation import evaluator
    from sft_recipe.evaluation.validation import ValidationResult

    losses = iter([9.0, 3.0, 1.0, 2.0, 2.0, 1.5, 2.0])  # the first before training
    monkeypatch.setattr(evaluator, "evaluate", lambda *_: ValidationResult(7 * next(losses), 7, 3))
    often = ["trainer.save_freq=1", "trainer.test_freq=1", "trainer.max_ckpt_to_keep=1"]
    assert run_here(*arguments(model, tmp_path, *often, "trainer.total_training_steps=4")) == 0
    assert checkpoints(tmp_path) == ["step_2", "step_4"]
    run = arguments(model, tmp_path, *often, "trainer.total_training_steps=6", "trainer.resume_from=auto")
    assert run_here(*run) == 0
    assert checkpoints(tmp_path) == ["step_2", "step_4", "step_6"]  # best, resumed from, newest
    assert (tmp_path / "out/checkpoints/best").resolve().name == "step_2"


def test_leftovers_of_killed_runs_are_removed(model, tmp_path):
    for name in (".step_3.partial", ".step_1.pruned"):
        (tmp_path / "out/checkpoints" / name).mkdir(parents=True)
    assert run_here(*arguments(model, tmp_path, "trainer.total_training_steps=2")) == 0
    assert checkpoints(tmp_path) == ["step_2"]


@pytest.mark.parametrize("shape", [[], ["lora.enabled=true", "lora.merge=true"], ["fsdp.param_offload=true"]])
def test_asynchronous_checkpoint_holds_the_state_of_its_step(model, tmp_path, monkeypatch, shape):
    """Each save is held back until the step after it is done."""
    use_cpu()
    from sft_recipe.checkpoint.async_saving import _Job
    from sft_recipe.training.trainer import SFTTrainer

    keep = ["trainer.max_ckpt_to_keep=null", "trainer.save_best=false", *shape]
    keep.append("model.override_config={attention_dropout: 0.1}")
    assert run_here(*arguments(model, tmp_path / "waiting", *keep, "trainer.async_save=false")) == 0
    trained, real_step, real_run = [], SFTTrainer.train_step, _Job._write_and_read_back
    written_after = []

    def step(self, number):
        row = real_step(self, number)
        trained.append(number)
        return row

    def run(self):
        begun = len(trained)
        while begun < STEPS and len(trained) == begun:
            pass
        real_run(self)
        written_after.append(trained[-1])

    monkeypatch.setattr(SFTTrainer, "train_step", step)
    monkeypatch.setattr(_Job, "_write_and_read_back", run)
    assert run_here(*arguments(model, tmp_path / "beside", *keep)) == 0
    assert written_after[:4] >= [3, 5, 7, 9]
    assert checkpoints(tmp_path / "beside") == checkpoints(tmp_path / "waiting")
    for name in checkpoints(tmp_path / "waiting"):
        one, other = (tmp_path / side / "out/checkpoints" / name for side in ("waiting", "beside"))
        left, right = states(one), states(other)
        assert left.keys() == right.keys() and all(value.equal(right[key]) for key, value in left.items())
        for path in (one / "huggingface").iterdir():
            assert path.read_bytes() == (other / "huggingface" / path.name).read_bytes(), path.name


def test_state_in_many_files_is_restored(model, saved, tmp_path, monkeypatch):
    from sft_recipe.checkpoint import state

    monkeypatch.setattr(state, "LARGEST_FILE", 20_000)
    run = arguments(model, tmp_path, "trainer.total_training_steps=4")
    assert run_here(*run) == 0
    assert len(list((tmp_path / "out/checkpoints/step_2/state").iterdir())) > 5
    shutil.rmtree(tmp_path / "out/checkpoints/step_4")
    assert run_here(*run, "trainer.resume_from=auto") == 0
    whole, resumed = (
        {name: value for (_, name), value in states(folder / "out/checkpoints/step_4").items()}
        for folder in (saved, tmp_path)
    )
    assert whole.keys() == resumed.keys() and all(value.equal(resumed[name]) for name, value in whole.items())


def test_too_little_memory_for_copies_disables_asynchronous_saving(model, tmp_path, monkeypatch, capfd):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=0))
    run = arguments(model, tmp_path, "trainer.total_training_steps=2")
    assert run_here(*run) == 0
    assert "too little memory" in capfd.readouterr().out


def test_duration_of_saves_is_reported(saved, model, tmp_path, capfd):
    run = arguments(model, tmp_path, "trainer.total_training_steps=4", "trainer.async_save=false")
    capfd.readouterr()
    assert run_here(*run) == 0
    output = " ".join(capfd.readouterr().out.split())
    assert re.search(
        r"Training waited [\d.]+ s for 2 checkpoints \([\d.]+% of the run\); writing took [\d.]+ s", output
    )
    assert "reading back not counted." in output
    assert output.count(" (training waited ") == 2 and "training blocked" not in output
    rows = metrics(tmp_path / "out")
    assert [("perf/save_s" in row, "perf/save_wait_s" in row) for row in rows] == [
        (row["step"] == 3,) * 2 for row in rows
    ]


def test_checkpoint_holds_no_pickle(saved):
    """Everything in it is JSON, text or safetensors; nothing is a pickle or an archive."""
    for path in (saved / "out/checkpoints/step_4").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert path.suffix in (".json", ".jinja", ".txt"), path
            path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                json.loads(path.read_text())


def test_saved_files_hold_no_secret(model, tmp_path, monkeypatch):
    from sft_recipe.config.compose import load_config

    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    override = "trainer.run_name='read with ${oc.env:HF_TOKEN}'"
    assert run_here(*arguments(model, tmp_path, override, "trainer.total_training_steps=1")) == 0
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written and not [
        path for path in written if "huggingface" not in path.parts and b"verysecret" in path.read_bytes()
    ]
    again = load_config([], config_dir=tmp_path / "out")
    assert again.trainer.run_name == "read with hf_verysecret"
