"""Runs every documented command in a copy of the repository: training as a dry run, the others as they are.

A block that cannot run here has a comment with the reason above it: <!-- not run: needs a hub -->.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.markdown import NOT_RUN, PAGES, blocks, text_of
from tests.support.runs import ROOT

NOT_RUN_BLOCKS = 15  # ./scripts/test.sh in both READMEs and CONTRIBUTING.md, SLURM, and what needs a run or model
ONE_STEP = "trainer.total_training_steps=1 data.max_length=128 data.train_batch_size=1"
BASH = {page: [block for block in blocks(page) if block.language == "bash"] for page in PAGES}
COMMANDS = list(
    dict.fromkeys(command for bash in BASH.values() for block in bash if not block.reason for command in block.commands)
)


@pytest.fixture(scope="module")
def tracked_files(tmp_path_factory) -> Path:
    """A copy of all files that git tracks, or would track."""
    folder = tmp_path_factory.mktemp("copy")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture
def copy(tracked_files) -> Path:
    """The copy without the run of an earlier command, which a second run and its check refuse."""
    shutil.rmtree(tracked_files / "outputs", ignore_errors=True)
    return tracked_files


def runnable(command: str) -> str:
    """Return a command in the form that is run here: short, without GPUs, a hub or other machines."""
    if re.search(r"(^|\s)\./train\.sh\b", command):
        return command if re.search(r"--(help|dry_run)\b", command) else f"{command} --dry_run"
    return f"{command} {ONE_STEP}" if "sft_recipe.main_sft" in command else command


def test_training_commands_become_dry_runs():
    assert runnable("N_GPUS=8 ./train.sh --lr 1e-5") == "N_GPUS=8 ./train.sh --lr 1e-5 --dry_run"
    assert runnable("./train.sh --help") == "./train.sh --help"
    assert runnable("python3 -m sft_recipe.main_sft") == f"python3 -m sft_recipe.main_sft {ONE_STEP}"


def test_commands_that_are_not_run_give_a_reason_and_are_counted():
    reasons = [block.reason for bash in BASH.values() for block in bash if block.reason]
    assert len(reasons) == sum(len(NOT_RUN.findall(text_of(page))) for page in PAGES) == NOT_RUN_BLOCKS


def test_every_page_with_commands_is_found():
    assert len(COMMANDS) > 30
    assert not [page for page in PAGES if len(re.findall(r"^```bash$", text_of(page), re.M)) != len(BASH[page])]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_succeeds(command, copy):
    if "mkdocs" in command and not find_spec("mkdocs"):
        pytest.skip("mkdocs-material is not installed")
    tools = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": tools, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        ["bash", "-c", runnable(command)],
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{runnable(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
