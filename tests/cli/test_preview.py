"""scripts/preview_data.py as a user calls it."""

import json
import os
import subprocess
import sys

import pytest

from sft_recipe.cli.flags import FLAGS
from sft_recipe.cli.preview import main
from tests.support.runs import ROOT

SCRIPT = ROOT / "scripts/preview_data.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.json"
    path.write_text(json.dumps([{"prompt": f"Number {n % 9}?", "response": "Yes. " * (n % 9 + 1)} for n in range(12)]))
    return path


def test_script_runs_from_another_folder(data, model_dir, tmp_path):
    """Flags, an environment variable, an override and the preview's own, in one; verl is never imported."""
    command = [SCRIPT, "--train_data", data, "-n", "2", "--html", "page.html", "data.max_length=30"]
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "MODEL_PATH": str(model_dir),
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("⟦Yes.") == 2
    assert "12 records, " in done.stdout and "3 exact duplicates" in done.stdout and "MAX_LENGTH 30" in done.stdout
    html = (tmp_path / "page.html").read_text()
    assert "Number 0? → Yes." in html and "2 of 12 conversations" in html
    assert "| sft_recipe" in done.stderr.replace("|   ", "| ") and not any(
        line.split("|")[-1].strip().startswith("verl") for line in done.stderr.splitlines()
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-n", "many"], "-n: many is not a number of conversations"),
        (["-n"], "-n needs a value"),
        (["--html", "--train_data", "x"], "--html needs a value"),
        (["--html", "/nowhere/page.html"], "there is no folder /nowhere"),
        (["--html", "/"], "is a directory"),
        (["--tran_data", "x"], "Did you mean --train_data?"),
        (["data.max_lenght=3"], "unknown key data.max_lenght"),
        (["--train_data", "/nowhere/a.json", "--model", "MODEL"], "Data file not found"),
        (["--train_data", "DATA", "--model", "/nowhere/model"], "there is no model at"),
    ],
)
def test_invalid_input_is_one_line_and_code_2(args, message, data, model_dir, capsys):
    places = {"DATA": str(data), "MODEL": str(model_dir)}
    assert main([places.get(word, word) for word in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_preview_flags_are_accepted_anywhere(data, model_dir, tmp_path, capsys):
    page = tmp_path / "p.html"
    assert main([f"--html={page}", "--train_data", str(data), "-n=0", "--model", str(model_dir)]) == 0
    assert page.is_file() and "⟦" not in capsys.readouterr().out


def test_help_shows_flags_that_change_the_preview(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{flag.name} " in text for flag in FLAGS if flag.name in ("train_data", "model_path", "max_length"))
    assert "-n NUMBER" in text and "--html FILE" in text and "--n_gpus" not in text
    assert max(map(len, text.splitlines())) <= 120
