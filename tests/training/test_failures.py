"""Trouble around a run: full disks, folders that vanish, a second run in the same folder, machines that are gone."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_recipe.checkpoint import manager as checkpoint
from sft_recipe.checkpoint import run_lock as lock
from sft_recipe.checkpoint.run_lock import FolderLock
from sft_recipe.config.preflight import RUN_FILES, writable_folder
from sft_recipe.engine.platform import select_platform
from sft_recipe.errors import CheckpointError
from tests.support import tiny
from tests.support.chaos import differences
from tests.support.runs import ROOT, metrics, run_here
from tests.support.small_run import STEPS, arguments, checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("trouble") / "model")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_here(*arguments(model, folder)) == 0
    return folder


@pytest.fixture(params=["waiting", "beside"])
def run(request, model, tmp_path):
    return arguments(model, tmp_path, f"trainer.async_save={str(request.param == 'beside').lower()}")


@pytest.fixture
def trainer():
    """The class of the trainer; verl must not be imported before its platform is chosen."""
    select_platform("cpu")
    from sft_recipe.training.trainer import SFTTrainer

    return SFTTrainer


def full_disk(monkeypatch, is_full):
    """Files of checkpoints cannot be written while `is_full()`; the metrics can."""
    real = checkpoint.sync

    def sync(path):
        if path.name.endswith(".partial") and is_full():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(checkpoint, "sync", sync)


def test_failed_save_is_retried_and_warned_about(monkeypatch, run, whole, tmp_path, capfd):
    answers = iter([False, True])
    full_disk(monkeypatch, lambda: next(answers, False))
    assert run_here(*run, "trainer.max_ckpt_to_keep=null") == 0
    said = capfd.readouterr().out
    assert said.count("WARNING") == 1 and "No space left on device" in said and "the next try is after step" in said
    there = {*checkpoints(tmp_path)}
    assert "step_4" not in there and {"step_2", f"step_{STEPS}"} <= there
    if "trainer.async_save=false" in run:
        assert "step_5" in there
    assert not differences(whole / "out", tmp_path / "out")


def test_failed_last_save_fails_the_run_and_keeps_earlier_checkpoints(monkeypatch, run, tmp_path, capfd):
    answers = iter([False])
    full_disk(monkeypatch, lambda: next(answers, True))
    assert run_here(*run) == 2
    said, error = capfd.readouterr()
    tries = [int(step) for step in re.findall(r"the next try is after step (\d+)", said)]
    assert tries == sorted(tries) and tries[-1] == STEPS
    assert f"step {STEPS} cannot be saved" not in said  # it is the error
    assert (
        error.count(f"step {STEPS} cannot be saved") == 1 and "--resume_from auto" in error and "Traceback" not in error
    )
    assert checkpoints(tmp_path) == ["step_2"]
    assert len(metrics(tmp_path / "out")) == STEPS


def test_free_disk_space_is_checked_before_anything_is_written(monkeypatch, run, tmp_path, capfd):
    asked = []

    def usage(folder):
        if "checkpoints" in folder.parts:
            asked.append(sorted(path.name for path in folder.iterdir()))
        return SimpleNamespace(free=1000, total=2**50)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    assert run_here(*run) == 2
    error = capfd.readouterr().err
    assert re.search(r"the disk is too full: about \d+\.\d\d [KM]B are needed and 1.00 KB are free", error)
    assert asked and not any(asked)


def test_metrics_wait_in_memory_while_they_cannot_be_written(monkeypatch, trainer, model, whole, tmp_path, capfd):
    """The run folder moves away after the third step, and comes back after the sixth."""
    real, away = trainer.train_step, tmp_path / "away"

    def step(self, number):
        if number == 3:
            (tmp_path / "out").rename(away)
        if number == 7:
            away.rename(tmp_path / "out")
        return real(self, number)

    monkeypatch.setattr(trainer, "train_step", step)
    assert run_here(*arguments(model, tmp_path)) == 0
    said = capfd.readouterr().out
    assert "metrics.jsonl cannot be written: No such file or directory" in said and "is written again" in said
    assert "step 4 cannot be saved" in said
    assert not differences(whole / "out", tmp_path / "out")


def test_removed_run_folder_is_an_error_and_is_not_recreated(monkeypatch, trainer, model, tmp_path, capfd):
    real = trainer.train_step

    def step(self, number):
        if number == 3:
            shutil.rmtree(tmp_path / "out")
        return real(self, number)

    monkeypatch.setattr(trainer, "train_step", step)
    assert run_here(*arguments(model, tmp_path, "trainer.async_save=false")) == 2
    assert "No such file or directory" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lora", ["false", "true"])
@pytest.mark.parametrize("moment", ["before the state is written", "before the export", "before the manifest"])
def test_save_does_not_recreate_a_vanished_run_folder(monkeypatch, model, tmp_path, capfd, moment, lora):
    """The folder vanishes in the middle of the first save, and stays away."""
    from sft_recipe.checkpoint.state import FsdpState
    from sft_recipe.export.huggingface import ModelSaver

    owner, name = {
        "before the state is written": (FsdpState, "_save"),
        "before the export": (ModelSaver, "save"),
        "before the manifest": (checkpoint, "write_manifest"),
    }[moment]
    real = getattr(owner, name)

    def vanish(*args):
        if (tmp_path / "out").exists():
            (tmp_path / "out").rename(tmp_path / "away")
        return real(*args)

    monkeypatch.setattr(owner, name, vanish)
    merged = [f"lora.enabled={lora}", f"lora.merge={lora}"]
    assert run_here(*arguments(model, tmp_path, *merged)) == 2
    assert "step 2 cannot be saved" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


def test_intervals_between_retries_double(trainer):  # which has chosen verl's platform before this import
    from sft_recipe.checkpoint import async_saving as saving

    tries, again = [], saving.AsyncSaver.__new__(saving.AsyncSaver)
    again.failures, again.say, again.last_step = 0, lambda _: None, 45

    def fail():
        raise CheckpointError("full")

    step = 1
    for _ in range(6):
        again._job = saving._Job(fail, lambda _: None, 0.0)
        again._job.start(overlap=False)
        again.wait(step)
        tries.append(again.retry_at - step)
        step = again.retry_at
    assert tries == [1, 2, 4, 8, 16, 13]  # the last one at the end of the run


HOLD = """
import sys, time
from pathlib import Path
from sft_recipe.checkpoint.run_lock import FolderLock
held = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_run_in_a_folder_is_refused(holder, model, tmp_path, capfd):
    assert run_here(*arguments(model, tmp_path, f"trainer.output_dir={tmp_path}")) == 2
    error = capfd.readouterr().err
    assert f"process {holder.pid} on {socket.gethostname()}" in error and "--output_dir" in error
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lock_ends_with_its_process(holder, tmp_path):
    holder.kill()
    holder.wait()
    FolderLock(tmp_path).release()
    FolderLock(tmp_path).release()


def as_from_elsewhere(folder):
    (folder / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "beats": 3}).ljust(256))


@pytest.mark.parametrize("has_locks", [True, False])
def test_run_on_another_machine_is_recognized_by_its_heartbeats(tmp_path, monkeypatch, has_locks):
    """Where the file system does not carry locks between machines; no clock is asked."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    as_from_elsewhere(tmp_path)
    beat = {"host": "elsewhere", "pid": 7, "beats": 4}
    text = json.dumps(beat).ljust(256)
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=lambda _: (tmp_path / ".lock").write_text(text)))
    with pytest.raises(CheckpointError, match="process 7 on elsewhere"):
        FolderLock(tmp_path)
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=lambda _: None))  # it died: no beat comes
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("content", ['{"pid": 1}', "[1]", "7", "not JSON \u00e9", "x" * 5000, "[" * 4096])
def test_lock_without_an_owner_is_held_only_while_it_changes(tmp_path, monkeypatch, content):
    (tmp_path / ".lock").write_text(content)
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=lambda _: (tmp_path / ".lock").write_text("{")))
    with pytest.raises(CheckpointError, match="another run is writing to .*: another process"):
        FolderLock(tmp_path)
    (tmp_path / ".lock").write_text(content)
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=lambda _: None))
    held = FolderLock(tmp_path)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "beats": 0}
    assert json.loads((tmp_path / ".lock").read_text()) == owner
    held.release()


def test_runs_may_check_a_folder_at_the_same_time(tmp_path):
    """Their process ids may be equal, as in two containers."""
    with ThreadPoolExecutor(8) as threads:
        assert {*threads.map(lambda _: writable_folder(tmp_path), range(400))} == {tmp_path}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_run_folder_that_cannot_be_written_is_refused(model, tmp_path, capfd):
    (tmp_path / "out").write_text("a file")
    assert run_here(*arguments(model, tmp_path)) == 2
    assert "cannot be written" in capfd.readouterr().err


def test_the_files_that_are_looked_at_before_a_run_are_those_that_it_writes(whole):
    assert set(RUN_FILES) <= {path.name for path in (whole / "out").iterdir()}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", ".lock"])
def test_unwritable_files_are_reported_before_the_first_step(model, tmp_path, capfd, name, make):
    """Here: a folder or a pipe stands where a file should."""
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    assert run_here(*arguments(model, tmp_path)) == 2
    error = capfd.readouterr().err
    assert f"{name} cannot be written: it is not a file" in error or f"locked: {name}" in error
    assert "Traceback" not in error


def test_lock_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(CheckpointError, match=r"cannot be locked: \.lock: Not a regular file"):
        FolderLock(tmp_path)


def test_folder_on_a_full_disk_cannot_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(CheckpointError, match=f"run folder {tmp_path} cannot be locked: .lock: No space left"):
        FolderLock(tmp_path)
    monkeypatch.undo()
    FolderLock(tmp_path).release()


def test_lock_is_not_inherited_by_child_processes(tmp_path):
    """A worker that outlives its run, as one of a killed run may, must not keep the folder."""
    mine = FolderLock(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)
        os._exit(0)
    os.close(mine.file)  # as the death of this process would
    held = FolderLock(tmp_path)
    os.write(writer, b"x")
    os.waitpid(child, 0)
    held.release()
    mine._released.set()
