"""The report that training writes: at evaluations, at the end, and never in the way of the run."""

import json

import pytest
from PIL import Image

from tests.support import small_run, tiny
from tests.support.runs import metrics, run_here


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("model"))


def test_a_run_writes_its_report_and_says_where(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SFT_LANG", "zh")
    assert run_here(*small_run.arguments(model, tmp_path, "trainer.total_epochs=1")) == 0
    folder = tmp_path / "out"
    page = (folder / "report.html").read_text()
    assert "训练报告" in page and "第 5 步，共 5 步" in page
    with Image.open(folder / "loss.png") as image:
        assert image.size == (1200, 640) and len(image.getcolors(1000)) > 10
    out = capsys.readouterr().out
    assert f"The report is in {folder / 'report.html'}" in out
    facts = json.loads((folder / "run.json").read_text())
    assert facts["peak_memory_gb"] >= max(row["perf/memory_gb"] for row in metrics(folder)) - 1e-4 > 0
    assert facts["parameters"] == facts["trainable"] > 1000 and facts["predicted_memory_gb"] > 0
    sizes = f"{facts['peak_memory_gb']:.2f} GiB, predicted {facts['predicted_memory_gb']:.2f}."
    assert f"Peak memory of a rank: {sizes}" in out
    assert "stopped_early" not in facts


def test_an_early_stop_is_in_the_report(model, tmp_path):
    stop = "trainer.early_stopping.target=100"
    assert run_here(*small_run.arguments(model, tmp_path, stop, "trainer.test_freq=2")) == 0
    assert "Stopped early:" in (tmp_path / "out/report.html").read_text()


def test_a_report_that_cannot_be_written_ends_nothing(model, tmp_path, capsys):
    (tmp_path / "out/report.html").mkdir(parents=True)
    assert run_here(*small_run.arguments(model, tmp_path, "trainer.total_epochs=1", "trainer.test_freq=2")) == 0
    assert capsys.readouterr().out.count("report of") == 1


def test_a_wrong_language_is_an_error_before_the_run(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SFT_LANG", "klingon")
    assert run_here(*small_run.arguments(model, tmp_path)) == 2
    assert "SFT_LANG 'klingon'" in capsys.readouterr().err
