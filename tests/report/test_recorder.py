"""Findings while a run trains: each is printed once, findings.json has the current ones, and no run ends by them."""

import json

import pytest
import yaml

from sft_recipe.errors import CheckpointError, ConfigError
from sft_recipe.report.compare import comparison_page
from sft_recipe.report.findings import find_problems
from sft_recipe.report.page import run_page
from sft_recipe.report.recorder import RunReporter
from sft_recipe.report.run import read_run
from sft_recipe.report.words import describe
from tests.report.made import falling, make_run, noisy, write_run
from tests.support import small_run, tiny
from tests.support.runs import run_here

FAULTY = make_run(noisy([2.4] * 40), norms=[90.0] * 40, rate=1e-7)
HEALTHY = make_run(noisy(falling(40)))


class Recorder(RunReporter):
    """One whose words are kept."""

    def __init__(self, folder, is_resumed=False, enabled=True):
        self.said = []
        super().__init__(folder, self.said.append, is_resumed, enabled)

    def update(self, is_last=True):
        super().update(is_last)


def recorded(folder):
    return [finding["rule"] for finding in json.loads((folder / "findings.json").read_text())]


def test_each_finding_is_printed_once(tmp_path):
    recorder = Recorder(write_run(tmp_path / "run", FAULTY))
    recorder.update()
    recorder.update()
    assert recorded(tmp_path / "run") == ["low_rate", "clipped"]
    assert recorder.said == [f"FINDING: {describe(finding)['text']}" for finding in find_problems(FAULTY)]


def test_what_no_longer_holds_leaves_the_file_and_is_not_printed_again(tmp_path):
    recorder = Recorder(write_run(tmp_path / "run", FAULTY))
    recorder.update()
    faulty = (tmp_path / "run/metrics.jsonl").read_text()
    write_run(tmp_path / "other", HEALTHY)
    (tmp_path / "run/metrics.jsonl").write_text((tmp_path / "other/metrics.jsonl").read_text())
    recorder.update()
    assert recorded(tmp_path / "run") == [] and len(recorder.said) == 2
    (tmp_path / "run/metrics.jsonl").write_text(faulty)
    recorder.update()
    assert len(recorded(tmp_path / "run")) == len(recorder.said) == 2


def test_a_resumed_run_does_not_print_them_again_and_a_new_one_does(tmp_path):
    folder = write_run(tmp_path / "run", FAULTY)
    Recorder(folder).update()
    resumed, new = Recorder(folder, is_resumed=True), Recorder(folder)
    resumed.update()
    new.update()
    assert (len(resumed.said), len(new.said)) == (0, 2)


def test_they_take_a_small_part_of_the_time(tmp_path, monkeypatch):
    """A look of one second is followed by 50 without one, but for the last."""
    now, looks = [100.0], []

    def look(folder):
        now[0] += 1
        looks.append(now[0])
        return FAULTY

    monkeypatch.setattr("sft_recipe.report.recorder.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sft_recipe.report.recorder.read_run", look)
    recorder = Recorder(tmp_path)
    for now[0] in (100.0, 102.0, 150.0, 151.0):
        recorder.update(is_last=False)
    recorder.update(is_last=True)
    assert looks == [101.0, 152.0, 153.0]


def test_only_one_rank_records(tmp_path):
    recorder = Recorder(write_run(tmp_path / "run", FAULTY), enabled=False)
    recorder.update()
    recorder.conclude("enough")
    assert recorder.said == [] and not (tmp_path / "run/findings.json").exists()
    assert not (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("text", ["[", "7", '[{"rules": 1}]', "[3]"])
def test_a_damaged_file_counts_as_none(tmp_path, text):
    folder = write_run(tmp_path / "run", FAULTY)
    (folder / "findings.json").write_text(text)
    recorder = Recorder(folder, is_resumed=True)
    recorder.update()
    assert len(recorder.said) == len(recorded(folder)) == 2


def test_a_failure_is_printed_once(tmp_path):
    folder = write_run(tmp_path / "run", FAULTY)
    (folder / "config.yaml").unlink()
    recorder = Recorder(folder)
    recorder.update()
    recorder.update()
    [text] = recorder.said
    assert text.startswith("WARNING: ") and "config.yaml does not exist" in text


def test_language(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_LANG", "zh_CN.UTF-8")
    recorder = Recorder(write_run(tmp_path / "run", FAULTY))
    recorder.update()
    assert "学习率过低" in recorder.said[0] and "学习率过低" in (tmp_path / "run/findings.json").read_text()
    monkeypatch.setenv("SFT_LANG", "tlh")
    with pytest.raises(ConfigError, match="SFT_LANG"):
        Recorder(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.json", "[]"),
        ("data.json", '{"cut": "many"}'),
        ("data.json", "{"),
        ("data.json", '{"lengths": 3}'),
        ("data.json", '{"lengths": {"p95": "x"}}'),
        ("samples.jsonl", '{"step": 4, "samples": [{"text": "Hi"}]}\n'),
        ("samples.jsonl", '{"step": 4, "samples": 3}\n'),
        ("samples.jsonl", "Hi\n"),
        ("metrics.jsonl", '{"loss": 3}\n'),
        ("metrics.jsonl", ""),
        ("config.yaml", "optim: {lr: ["),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text):
    folder = write_run(tmp_path / "run", FAULTY)
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        read_run(folder)


def test_edited_values_of_a_wrong_kind_count_as_absent(tmp_path):
    folder = write_run(tmp_path / "run", FAULTY)
    texts = {"lr": "fast", "lr_warmup_steps": [1], "lr_warmup_steps_ratio": "x", "clip_grad": {}}
    config = {"optim": texts, "trainer": {"total_training_steps": "x", "total_epochs": "y"}, "data": 3, "lora": "no"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    row = {"step": 40, "epoch": "last", "train/loss": "low", "val/loss": [], "val/tokens": "many"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    (folder / "run.json").write_text('{"device": 3, "parameters": "x", "predicted_memory_gb": {}, "model": [1]}')
    (folder / "samples.jsonl").write_text('{"step": 1, "samples": [{"answer": "x"}]}\n' * 2)
    assert [finding.rule for finding in find_problems(read_run(folder))] == ["nonfinite", "low_rate"]
    assert "low_rate" not in run_page(read_run(folder)) and comparison_page([read_run(folder)] * 2)


def test_a_run_prints_and_records_its_findings(tmp_path, capsys, monkeypatch):
    """At an evaluation, and once more neither at the end nor after a resume."""
    tiny.build_model(tmp_path / "model")
    run = small_run.arguments(tmp_path / "model", tmp_path, "data.truncation=right", "data.max_length=48")
    assert run_here(*run, "trainer.total_training_steps=4", "trainer.test_freq=2") == 0
    shown = capsys.readouterr().out
    first = describe(find_problems(read_run(tmp_path / "out"))[0])
    assert first["rule"] == recorded(tmp_path / "out")[0] == "cut_data"
    assert shown.count("FINDING: ") == 1 and shown.index("FINDING: ") < shown.index("step 4/4")
    assert run_here(*run, "trainer.total_training_steps=6", "trainer.resume_from=auto") == 0
    assert "FINDING" not in capsys.readouterr().out


def test_a_failure_of_findings_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    def fail(run):
        raise ZeroDivisionError("a rule is wrong")

    monkeypatch.setattr("sft_recipe.report.recorder.find_problems", fail)
    tiny.build_model(tmp_path / "model")
    assert run_here(*small_run.arguments(tmp_path / "model", tmp_path, "trainer.test_freq=2")) == 0
    assert capsys.readouterr().out.count("a rule is wrong") == 1
