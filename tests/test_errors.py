"""Errors end a command with one message; so does an output that cannot be written."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_recipe.errors import RecipeError, pip_install, run_command
from tests.support.runs import ROOT

PROGRAM = """
import sys
from sft_recipe.errors import run_command
sys.exit(run_command(lambda: print("line\\n" * 100_000) or 0))
"""


def run(stdout: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=stdout, stderr=subprocess.PIPE, env=environment, text=True
    )


def test_closed_pipe_ends_a_command_without_a_message():
    reader, writer = os.pipe()
    os.close(reader)
    done = run(writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_full_disk_below_stdout_is_one_message():
    with open("/dev/full", "w") as full:
        done = run(full.fileno())
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


def test_file_on_a_full_disk_is_named(monkeypatch, capsys):
    def command():
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")

    monkeypatch.setattr(os, "dup2", lambda *_: None)  # the output of the tests stays
    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: /disk/file cannot be written: No space left on device\n"


@pytest.mark.parametrize(("path", "problem"), [("x" * 5000, "File name too long"), ("loop", "symbolic links")])
def test_path_that_cannot_be_used_is_one_message(path, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert run_command(lambda: os.stat(path).st_size) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path[:300]}: ") and problem in message and len(message) < 400


def test_other_system_errors_are_not_hidden():
    with pytest.raises(FileNotFoundError):
        run_command(lambda: len(Path("/nowhere").read_text()))


def test_recipe_error_is_one_message_and_its_exit_code(capsys):
    def fail():
        raise RecipeError("wrong")

    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_missing_module_of_ours_is_not_hidden(capsys):
    with pytest.raises(ModuleNotFoundError):
        run_command(lambda: __import__("sft_recipe.nothing"))
    assert run_command(lambda: __import__("nothing.at.all")) == 2
    assert capsys.readouterr().err.startswith("error: the package nothing is not installed for ")


def test_ctrl_c_is_one_message(capsys):
    def stopped():
        raise KeyboardInterrupt

    assert run_command(stopped) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_packages_are_installed_where_the_program_runs(monkeypatch, tmp_path):
    """The pip of the shell may be that of another Python."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/bin/python")
    assert pip_install("ray") == "pip install ray"
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/.venv/bin/python")
    assert pip_install("ray") == f"{tmp_path}/.venv/bin/python -m pip install ray"
    monkeypatch.chdir(tmp_path)
    assert pip_install("ray") == ".venv/bin/python -m pip install ray"
