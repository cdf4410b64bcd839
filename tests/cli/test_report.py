"""scripts/report.py: pages, tables and JSON of runs, and bad input."""

import json

import pytest

from sft_recipe.cli.report import main
from tests.report.made import falling, make_run, noisy, write_run

GOOD = noisy(falling(40))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFT_LANG", raising=False)
    write_run(tmp_path / "a", make_run(GOOD, validation={0: 2.5, 40: 1.5}))
    write_run(tmp_path / "b", make_run([None] * 40, norms=[None] * 40, rate=1e-3))
    return tmp_path


def test_one_run_gets_its_page_and_image(runs, capsys):
    assert main(["a"]) == 0
    assert (runs / "a/report.html").read_text().startswith("<!doctype html>")
    assert (runs / "a/loss.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Validation loss" in out and "1.500" in out and out.endswith("page: a/report.html\n")


def test_several_runs_get_one_page_and_their_findings(runs, capsys):
    assert main(["a", "b", "--out", "both.html", "--lang", "zh"]) == 0
    assert "不同之处" in (runs / "both.html").read_text()
    assert not (runs / "a/report.html").exists()
    names, *lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("b: 损失或梯度不是有限值。") for line in lines) and lines[-1] == "页面：both.html"
    assert names.split() == ["a", "b"] and [line for line in lines if line.isascii()] == []


def test_the_table_says_that_validation_data_differ(runs, capsys):
    write_run(runs / "c", make_run(GOOD, validation={0: 2.0, 40: 1.0}, data__val_files="other.json"))
    assert main(["a", "c"]) == 0
    assert "\nThe runs were validated on different data, so no run is marked" in capsys.readouterr().out


def test_json_is_complete_and_writes_nothing(runs, capsys):
    assert main(["a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["runs"]
    assert first["summary"]["scores"]["val/loss"]["last"] == 1.5
    assert second["findings"][0]["rule"] == "nonfinite"
    assert found["differences"] == {"optim.lr": [2e-5, 1e-3]}
    assert second["command"].startswith("./train.sh ") and "optim.lr=0.001" in second["command"]
    assert not list(runs.glob("**/*.html"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "RUN"),
        (["missing"], "missing does not exist"),
        (["."], "has no metrics.jsonl"),
        (["a", "a/../a"], "named twice"),
        (["a", "--lang", "fr"], "--lang 'fr'"),
        (["a", "--out", "b"], "is a directory"),
        (["a", "--out", "no/where/x.html"], "there is no folder"),
        (["a", "--out", ""], "--out needs a value"),
        (["a", "--out", "a/metrics.jsonl/x.html"], "there is no folder"),
        (["a", "--josn"], "Did you mean --json"),
        ([str(number) for number in range(9)], "up to 8"),
        (["broken"], "line 1 is not JSON"),
        (["nested"], "line 1 is not JSON"),
        (["empty"], "has no step yet"),
        (["unconfigured"], "config.yaml does not exist"),
        (["x" * 5000], "File name too long"),
    ],
)
def test_bad_input_is_one_message(runs, capsys, args, message):
    for name, text in (
        ("broken", "no\n{}\n"),
        ("nested", "[" * 100_000 + "\n"),
        ("empty", ""),
        ("unconfigured", '{"step": 1}\n'),
    ):
        (runs / name).mkdir()
        (runs / name / "metrics.jsonl").write_text(text)
    assert main(args) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("error:") == 1 and message in error and "Traceback" not in error


def test_a_language_of_the_environment_that_is_unknown_is_an_error(runs, capsys, monkeypatch):
    monkeypatch.setenv("SFT_LANG", "de")
    assert main(["a"]) == 2
    assert "SFT_LANG 'de'" in capsys.readouterr().err
