"""The launcher imports little; SFT_TIMING=1 shows where the time to the first step goes."""

import gc
import json
import subprocess
import sys

import pytest

from sft_recipe import timing
from tests.support.runs import ROOT, launch
from tests.support.small_run import arguments

HEAVY = ("torch", "numpy", "transformers", "verl", "ray", "pandas")

LAUNCHER = """
import os, sys
from sft_recipe.cli import train as launch
from sft_recipe import main_sft
launcher = os.getpid()
main_sft.start = lambda arguments, parent, config: os._exit(
    75 if parent == launcher and config and "RANK" not in os.environ else 1
)
os.environ["RANK"] = "7"
code = launch.main(sys.argv[1:])
print(code, [name for name in {heavy} if name in sys.modules])
"""

END = """
import atexit, sys
from sft_recipe import main_sft
class Torn:
    def __del__(self):
        print("torn down")
torn = Torn()
atexit.register(print, "exit handler")
main_sft.main = lambda arguments, config: int(arguments[0])
main_sft.start(sys.argv[1:], None)
"""


def run(program, *words, code=0):
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()


def test_launcher_of_a_single_rank_imports_little_and_returns_its_exit_code():
    assert run(LAUNCHER.format(heavy=HEAVY))[-1] == "75 []"


@pytest.mark.parametrize(("code", "printed"), [(0, ["exit handler"]), (3, [])])
def test_rank_runs_exit_handlers_only_after_success(code, printed):
    assert run(END, str(code), code=code) == printed


def test_time_to_the_first_step_is_shown_and_written(model_dir, tmp_path):
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


def test_nothing_is_measured_by_default(monkeypatch):
    monkeypatch.setattr(timing, "ENABLED", False)
    timing.mark("anything")
    assert timing._phases == [] and len(timing.table().splitlines()) == 1


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_collection_resumes_after_imports(was_enabled):
    try:
        gc.enable() if was_enabled else gc.disable()
        with pytest.raises(ImportError), timing.paused_gc():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
        gc.unfreeze()
