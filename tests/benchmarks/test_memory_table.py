"""The memory benchmark: what was measured is kept, failures are not, and its tables state the differences."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import memory_runs, memory_table
from benchmarks.memory_runs import RUNS
from sft_recipe.engine.rehearsal.session import RehearsalFailed


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return the list of runs that were trained: none is, their facts are made here."""
    trained = []

    def train(run, folder):
        trained.append(run)
        (folder / "run").mkdir(parents=True)
        (folder / "run/data.json").write_text(json.dumps({"lengths": {"max": 99}}))
        if len(trained) == 1:
            raise RuntimeError("out of memory")
        (folder / "run/run.json").write_text(json.dumps({"peak_memory_gb": 1.5}))

    for module in (memory_runs, memory_table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(memory_runs, "_train", train)
    return trained


def test_a_run_is_measured_once_and_again_where_it_failed(results, tmp_path):
    run = RUNS[0]
    with pytest.raises(RuntimeError, match="out of memory"):
        memory_runs.measured(run)
    found = memory_runs.measured(run)
    assert (found["peak"], found["longest"]) == (int(1.5 * 2**30), 99)
    assert memory_runs.measured(run) == found and results == [run, run]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # nothing large stays


def test_runs_that_judge_differ_from_those_that_were_fitted():
    judged = [run for run in RUNS if run.is_held_out]
    assert len({run.name for run in RUNS}) == len(RUNS)
    shapes = {(run.model, run.length, run.documents, run.ranks, run.overrides) for run in RUNS}
    assert len(shapes) == len(RUNS)
    assert {run.ranks for run in judged} == {1, 2} and {256, 4096} <= {run.length for run in judged}


def test_a_table_says_how_many_differences_are_inside_the_target(capsys):
    rows = [memory_table._row(["a"], *sizes, 1) for sizes in ((98, 100), (109, 100), (1115, 1000), (96, 100))]
    found, summary = memory_table.collect("run", 4, iter(rows))
    assert [row[-1] for row in found] == ["-2.0%", "+9.0%", "+11.5%", "-4.0%"]
    assert summary == "Differences go from -4.0% to +11.5%; 2 of 4 are between -3% and +10%."
    assert memory_table.collect("run", 6, iter(rows))[1] == f"{summary} 2 of 6 have no result."
    assert memory_table.collect("run", 6, iter([])) == ([], "6 of 6 have no result.")
    assert "run 3 of 4: a" in capsys.readouterr().out


def test_a_table_of_what_is_stored_measures_nothing(results, monkeypatch):
    assert (
        list(memory_table.run_rows(RUNS, stored=True)) == []
        and list(memory_table.case_rows(memory_table.CASES, stored=True)) == []
    )
    monkeypatch.setattr(
        memory_table, "predicted", lambda run, longest: (SimpleNamespace(needed=lambda _: 2**30), False)
    )
    with pytest.raises(RuntimeError):
        memory_runs.measured(RUNS[1])
    memory_runs.measured(RUNS[1])
    [(row, difference)] = memory_table.run_rows(RUNS[:3], stored=True)
    assert row[-3:] == ["1.00 GiB", "1.50 GiB", "-33.3%"] and len(results) == 2


def test_a_step_that_cannot_be_rehearsed_is_reported_and_left_out(results, monkeypatch, capsys):
    class Session:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def run(self, case):
            if case.ranks == 1:
                raise RehearsalFailed("no such kernel", "")
            return SimpleNamespace(peak=2**31, peaks={})

    monkeypatch.setattr(memory_table, "RehearsalSession", Session)
    monkeypatch.setattr(memory_table, "_predicted_case", lambda *_: 2**30)
    cases = [("Qwen2.5-0.5B", memory_table.FSDP, ranks, 2048, 1, True) for ranks in (1, 8)]
    for stored in (False, True):
        [(row, difference)] = memory_table.case_rows(cases, stored)
        assert (row[2], difference) == ("8", -50)
    assert capsys.readouterr().err == "Qwen2.5-0.5B, fsdp, 1 GPU(s): not rehearsed: no such kernel\n"
