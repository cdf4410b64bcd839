"""Where ranks meet: those of one run do, and nobody else."""

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_recipe import main_sft
from sft_recipe.distributed.rendezvous import is_error_reporter, remove_rendezvous_dir, rendezvous_dir
from sft_recipe.errors import PreflightError

fork = multiprocessing.get_context("fork")


def places_of_children(count=2):
    """Of processes that run at the same time and have the same parent."""
    found, all_met = fork.Queue(), fork.Barrier(count)

    def meet():
        found.put(str(rendezvous_dir()))
        all_met.wait(timeout=600)
        remove_rendezvous_dir()

    children = [fork.Process(target=meet) for _ in range(count)]
    for child in children:
        child.start()
    places = {found.get(timeout=600) for _ in children}
    for child in children:
        child.join()
    return places


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_ranks_of_one_launcher_share_a_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(places_of_children()) == 1


def test_ranks_of_another_launcher_share_a_folder(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(places_of_children()) == 1


@pytest.mark.parametrize("world", [None, "1"])  # before it has given itself its numbers, and after
def test_single_process_runs_of_one_shell_share_no_folder(monkeypatch, world):
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert len(places_of_children()) == 2


def test_ranks_meet_in_the_folder_that_torchrun_has_created(monkeypatch, tmp_path):
    """Its name is random; every rank knows a file in it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = set()
    for rank in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/attempt_0/{rank}/error.json")
        found.add(rendezvous_dir())
    (folder,) = found
    assert folder.is_relative_to(tmp_path) and folder.is_dir()


@pytest.mark.parametrize("there", ["readable", "a link", "a file"])
def test_folder_that_others_can_create_must_be_private(monkeypatch, tmp_path, there):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = rendezvous_dir().parent
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    if there == "readable":
        folder.chmod(0o755)
    else:
        remove_rendezvous_dir()
        (tmp_path / "other").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "other") if there == "a link" else folder.touch()
    with pytest.raises(PreflightError, match=str(folder)):
        rendezvous_dir()


def test_folder_of_another_user_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rendezvous_dir()
    real = Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: SimpleNamespace(st_mode=real(path).st_mode, st_uid=os.getuid() + 1))
    with pytest.raises(PreflightError, match="not yours alone"):
        rendezvous_dir()


def test_restarted_rank_finds_the_folder_of_its_run(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(places_of_children()) == 1


def test_a_rank_that_is_ended_after_an_error_was_reported_says_nothing(monkeypatch, capfd):
    """The torchrun of several ranks ends the others as soon as one has failed."""
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def stopped():
        with pytest.raises(SystemExit) as caught:
            main_sft._end_before_training(os.getpid(), signal.SIGTERM, None)
        return caught.value.code, capfd.readouterr().err

    try:
        assert stopped() == (143, "stopped by SIGTERM before training started\n")
        assert is_error_reporter() and not is_error_reporter()
        assert stopped() == (143, "")
    finally:
        remove_rendezvous_dir()
