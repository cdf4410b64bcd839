"""The benchmark of findings: its runs are well formed, and its table counts what is right."""

import json
import shutil

import pytest

from benchmarks import findings as benchmark
from sft_recipe.report.findings import RULES
from tests.report.made import falling, make_run, noisy, write_run

FAULT = benchmark.Case("a fault", "sums", [], ["low_rate"])
HEALTHY = benchmark.Case("a healthy run", "sums")


def test_cases_expect_rules_that_exist_and_have_data_of_their_own():
    assert len(benchmark.CASES) >= 24 and len({case.name for case in benchmark.CASES}) == len(benchmark.CASES)
    assert len(benchmark.HEALTHY) >= 8 and len(benchmark.FAULTY) >= 12
    assert {rule for case in benchmark.CASES for rule in case.expected} <= {rule.name for rule in RULES}
    for case in benchmark.CASES:
        training, validation = benchmark.split(case)
        assert len(training) >= 8 and len(validation) == benchmark.VALIDATION
        assert benchmark.split(case) == (training, validation)


def test_a_run_is_right_by_its_first_finding_and_a_healthy_one_by_all_evaluations(tmp_path):
    """A finding that was gone at the end still counts against a healthy run."""
    flat = make_run(noisy([2.4] * 30), rate=1e-7)
    late = make_run(
        noisy([2.4] * 25 + falling(40)), validation={0: 2.0, 25: 2.0, 65: 1.8}, rate=2e-5, optim__lr_warmup_steps=1
    )
    write_run(benchmark.folder_of(FAULT, tmp_path), flat)
    write_run(benchmark.folder_of(HEALTHY, tmp_path), late)
    assert benchmark.found(FAULT, tmp_path) == ["low_rate"] and benchmark.is_right(FAULT, ["low_rate", "clipped"])
    assert benchmark.found(HEALTHY, tmp_path) == ["flat"] and not benchmark.is_right(HEALTHY, ["flat"])
    assert not benchmark.is_right(FAULT, ["clipped", "low_rate"]) and not benchmark.is_right(FAULT, [])
    assert benchmark.is_right(HEALTHY, [])
    text = benchmark.results([FAULT, HEALTHY], tmp_path)
    assert "names it | 1 of 1 | 0 of 0 |" in text and "no finding | 0 of 1 | 0 of 0 |" in text


def test_complete_runs_are_not_repeated(tmp_path, monkeypatch):
    calls = []

    def run(command, **given):
        calls.append(command)
        folder = benchmark.folder_of(FAULT, tmp_path)
        shutil.rmtree(folder)
        write_run(folder, make_run(noisy([2.4] * 30), rate=1e-7))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    benchmark.train(FAULT, tmp_path)
    benchmark.train(FAULT, tmp_path)
    [command] = calls
    folder = benchmark.folder_of(FAULT, tmp_path)
    assert f"trainer.output_dir={folder}" in command
    lines = (tmp_path / "a_fault.train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == benchmark.split(FAULT)[0]


def test_an_unknown_name_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["findings", "--only", "nothing"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2 and "'nothing' is no run" in capsys.readouterr().err
