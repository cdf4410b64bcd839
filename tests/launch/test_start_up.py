"""A run starts soon: nothing is imported that it does not use; SFT_TIMING=1 tells where the time went."""

import gc
import json
import subprocess
import sys

import pytest

from sft_recipe import timing
from sft_recipe.engine.import_stubs import UNUSED, quick_imports
from tests.support.runs import ROOT, launch
from tests.support.small_run import arguments

HEAVY = ("torch", "numpy", "transformers", "verl", *UNUSED)

LAUNCHER = """
import os, sys
from sft_recipe.cli import train as launch
from sft_recipe import main_sft
launcher = os.getpid()
main_sft.start = lambda arguments, parent: os._exit(75 if parent == launcher and "RANK" not in os.environ else 1)
os.environ["RANK"] = "7"
code = launch.main(sys.argv[1:])
print(code, [name for name in {heavy} if name in sys.modules])
"""

RANK = """
import sys
from sft_recipe import main_sft
assert main_sft.main(sys.argv[1:]) == 0
print([name for name in {unused} if name in sys.modules])
kinds = "_StandIn", "_Module"
modules = [(name, module) for name, module in list(sys.modules.items()) if name.partition(".")[0] != "verl"]
print([name for name, module in modules for value in vars(module).values() if type(value).__name__ in kinds])
"""

END = """
import atexit, sys
from sft_recipe import main_sft
class Torn:
    def __del__(self):
        print("torn down")
torn = Torn()
atexit.register(print, "goodbye")
main_sft.main = lambda arguments: int(arguments[0])
main_sft.start(sys.argv[1:], None)
"""


def run(program, *words, code=0):
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()


def test_the_launcher_of_a_single_rank_imports_next_to_nothing_and_hands_its_exit_code_on():
    assert run(LAUNCHER.format(heavy=HEAVY))[-1] == "75 []"


@pytest.mark.parametrize(("code", "said"), [(0, ["goodbye"]), (3, [])])
def test_a_rank_says_goodbye_where_all_went_well_and_leaves_its_threads_alone(code, said):
    assert run(END, str(code), code=code) == said


def test_a_rank_imports_nothing_that_training_does_not_use(model_dir, tmp_path):
    steps = ["trainer.total_training_steps=1", "data.val_files=null"]
    assert run(RANK.format(unused=UNUSED), *arguments(model_dir, tmp_path, *steps))[-2:] == ["[]", "[]"]


def test_the_time_to_the_first_step_is_told_and_kept(model_dir, tmp_path):
    run = arguments(model_dir, tmp_path, "trainer.total_training_steps=2", "data.val_files=null")
    done = launch(*run, SFT_TIMING="1")
    assert done.returncode == 0, done.stderr
    phases = json.loads((tmp_path / "out" / timing.FILE).read_text())
    names = [phase["phase"] for phase in phases]
    assert names[:2] == ["train.sh, its environment", "launcher: configuration"] and names[-1] == "first step"
    assert [name for name in names if name in done.stdout] == names
    assert "launcher: torchrun" not in names and len(set(names)) == len(names)
    assert sum(phase["seconds"] for phase in phases) == pytest.approx(phases[-1]["at"], abs=0.01)
    assert all(phase["seconds"] >= 0 and phase["cpu_seconds"] >= 0 for phase in phases)


def test_without_being_asked_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(timing, "ENABLED", False)
    timing.mark("anything")
    assert timing._phases == [] and len(timing.table().splitlines()) == 1


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that tells on being imported."""
    (tmp_path / "greedy").mkdir()
    (tmp_path / "greedy" / "__init__.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "greedy"
    for name in [name for name in sys.modules if name.partition(".")[0] == "greedy"]:
        del sys.modules[name]


def test_a_stand_in_can_be_named_and_inherited_from_and_decorate_but_not_used(package):
    names = {}
    with quick_imports([package]):
        exec(
            "import greedy.deep.inside as inside\n"
            "from greedy.actors import Actor, remote\n"
            "@remote\n"
            "class Worker: pass\n"
            "class Mine(Actor): pass\n"
            "def act(on: 'Actor | None', actors: list[Actor]): pass\n",
            names,
        )
    for used in (names["Actor"], names["Mine"], names["Worker"], names["inside"].get, names["Actor"].options):
        with pytest.raises(RuntimeError, match="was called, but training"):
            used()


def test_afterwards_whoever_imports_it_gets_the_real_one(package):
    with quick_imports([package]):
        import greedy

        assert not hasattr(greedy, "__version__") and greedy.value != 1
    import greedy

    assert greedy.value == 1


def test_what_is_there_already_stays(package):
    import greedy

    with quick_imports([package]):
        import greedy as again
    assert again is greedy and again.value == 1


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_collected_again_afterwards_if_it_was_before(was_enabled):
    try:
        gc.enable() if was_enabled else gc.disable()
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
        gc.unfreeze()
