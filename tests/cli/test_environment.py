"""The scripts before the first installation: what they check, what they never delete, where they are called from.

A stand-in for python3 has no packages, records what it is asked to do, and can create no environment.
"""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.runs import ROOT

PYTHON = f"""#!/bin/bash
echo "$@" >> "$0.log"
case "$*" in
  -c*) exit 0 ;;
  "-m venv"*) exit 3 ;;
  *) exec {sys.executable} -S "$@" ;;  # without the packages of its environment
esac
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository in which nothing is installed."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("train.sh", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / "sft_recipe").symlink_to(ROOT / "sft_recipe")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)
    return folder


@pytest.fixture
def start(copy, tmp_path):
    """Return a function that runs a command and returns its result, and what python3 was asked to do."""

    def run(*command):
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=60)
        log = tmp_path / "bin/python3.log"
        return done, log.read_text() if log.exists() else ""

    return run


COMMANDS = {
    "train.sh": (["--epoch", "3"], "error: unknown flag --epoch. Did you mean --epochs?\n"),
    "scripts/preview_data.py": (["--html"], "error: --html needs a value\n"),
    "scripts/preview_schedule.py": (["--svg"], "error: --svg needs a value\n"),
    "scripts/prepare_sft_data.py": (["--in", "x", "--out", "y", "--small", "0"], "error: --small is 0;"),
    "scripts/chat.py": (["x", "--top_p", "2"], "error: --top_p is 2.0;"),
    "scripts/serve.py": (["x", "--port", "-1"], "error: --port is -1;"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_flag_is_reported_before_the_installation(copy, start, name):
    words, expected_text = COMMANDS[name]
    done, asked = start(copy / name, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(expected_text) and done.stderr.count("\n") == 1
    assert "-m venv" not in asked


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_environment(copy, start, name):
    done, asked = start(copy / name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {'./' * (name == 'train.sh')}{name}") and "-m venv" not in asked


@pytest.mark.parametrize("name", COMMANDS)
def test_script_is_found_through_a_link(copy, start, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/link"
    link.symlink_to(copy / name)
    done, asked = start(link, *COMMANDS[name][0])
    assert done.stderr.startswith(COMMANDS[name][1])


PREPARE = ["--in", "x", "--out", "y"]


@pytest.mark.parametrize("kind", ["link", "link to an environment", "other folder"])
def test_folder_that_is_no_environment_of_the_project_is_never_cleared(copy, start, tmp_path, kind):
    folder = copy / ".venv" if kind == "other folder" else tmp_path / "precious"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").touch()  # cannot be executed
    if "environment" in kind:
        (folder / "pyvenv.cfg").touch()
    if kind != "other folder":
        (copy / ".venv").symlink_to(folder)
    done, asked = start(copy / "scripts/prepare_sft_data.py", *PREPARE)
    assert done.returncode == 2 and f"the Python in {copy}/.venv cannot be run here" in done.stderr
    assert "-m venv" not in asked and (folder / "bin/python").exists()


@pytest.mark.parametrize("kind", ["none", "empty", "broken environment"])
def test_missing_or_broken_environment_is_made_again(copy, start, kind):
    if kind != "none":
        (copy / ".venv").mkdir()
    if kind == "broken environment":
        (copy / ".venv/pyvenv.cfg").touch()
    done, asked = start(copy / "scripts/prepare_sft_data.py", *PREPARE)
    assert done.returncode == 2 and f"-m venv --clear {copy}/.venv\n" in asked


def test_second_first_start_says_that_it_waits(copy, start, tmp_path):
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    with (copy / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [copy / "scripts/prepare_sft_data.py", *PREPARE]
        second = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE)
        assert second.stderr.readline().startswith(f"Waiting for another installation into {copy}/.venv (log: ")
    second.communicate(timeout=60)
    assert f"-m venv --clear {copy}/.venv" in (tmp_path / "bin/python3.log").read_text()


@pytest.mark.parametrize("is_installed", ["true", "false"])
def test_a_run_does_not_hold_the_lock_of_the_installation(copy, is_installed):
    """What is installed and what installs are stubs; another start finds the lock free while this one trains."""
    script = f"""
        . scripts/environment.sh
        usable() {{ {is_installed}; }}; supported() {{ true; }}; find_python() {{ echo python3; }}; embedded_model=x
        install_environment "" && flock -n {copy}/.venv.lock true && ls -l /proc/$$/fd
    """
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/python").symlink_to("/bin/true")
    done = subprocess.run(["bash", "-c", script], cwd=copy, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ".venv.lock" not in done.stdout


@pytest.mark.parametrize(
    "words",
    [["-m", "sft_recipe.main_sft"], ["-m", "sft_recipe.cli.train"], ["scripts/generate_reference.py"]]
    + [["-m", "sft_recipe.cli.preview"], ["-m", "sft_recipe.cli.prepare", "--in", "config.yaml", "--out", "x"]],
    ids=lambda words: words[1] if words[0] == "-m" else words[0],
)
def test_missing_packages_are_one_message_that_says_how_to_start(words):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the package ") and done.stderr.count("\n") == 1
    assert "./train.sh" in done.stderr
