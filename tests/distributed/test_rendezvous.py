"""Where ranks meet: those of one run do, and nobody else."""

import multiprocessing
import os

import pytest

from sft_recipe.distributed.rendezvous import remove_rendezvous_dir, rendezvous_dir

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


def test_restarted_rank_finds_the_folder_of_its_run(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(places_of_children()) == 1
