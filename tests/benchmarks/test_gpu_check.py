"""The check of real GPUs: its comparison with the CPU, its table, and its message without a GPU."""

from math import inf

import pytest
import torch

from benchmarks.gpu_check import STEPS, Case, Run, cases, difference, main, rows_of, train
from tests.support import tiny


def run(losses, norm=1.0, problem=""):
    rows = [
        {"train/loss": loss, "train/grad_norm": norm, "perf/memory_gb": 1.5, "perf/mfu": 0.25, "perf/tokens_per_s": 1e4}
        for loss in losses
    ]
    return Run(rows, 1.25, "bf16", problem)


@pytest.mark.parametrize(
    ("losses", "norm", "expected"),
    [([2.0] * STEPS, 1.0, 0.0), ([2.0, 2.0, 2.2, 2.0], 1.0, 0.1), ([2.0] * STEPS, 1.5, 0.5), ([2.0], 1.0, inf)],
)
def test_difference_is_the_largest_of_all_steps(losses, norm, expected):
    assert difference(run(losses, norm), run([2.0] * STEPS)) == pytest.approx(expected)


def test_table_has_the_prediction_beside_the_peak():
    case = Case("fsdp, full", [], 8)
    done, failed = rows_of([(case, run([2.0] * STEPS), 1e-3), (case, run([], problem="out of memory"), inf)])
    assert done == ["fsdp, full", "8", "bf16", "1.0e-03", "10,000", "25.0%", "1.50 GiB", "1.25 GiB"]
    assert failed[3] == "failed: out of memory" and len(failed) == len(done)


def test_cases_cover_one_and_all_gpus():
    assert {case.gpus for case in cases(8)} == {1, 8} and len(cases(1)) * 2 == len(cases(8)) == 34


def test_without_a_gpu_it_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: this machine has no GPU that PyTorch sees\n"


@pytest.mark.slow
def test_a_run_is_read_from_its_banner_and_its_metrics(tmp_path):
    """The command of a case, on the CPU."""
    model = tiny.build_model(tmp_path / "model")
    found = train(str(model), Case("LoRA", ["lora.enabled=true"], 1), "cpu", tmp_path / "run")
    assert found.problem == "" and len(found.rows) == STEPS and found.dtype == "fp32" and found.predicted is not None
    assert difference(found, found) == 0
    assert "failed" not in rows_of([(Case("LoRA", [], 1), found, 0.0)])[0][3]
    failed = train(str(model), Case("wrong", ["optim.optimizer=Foo"], 1), "cpu", tmp_path / "failed")
    assert "torch.optim has no optimizer Foo" in failed.problem
