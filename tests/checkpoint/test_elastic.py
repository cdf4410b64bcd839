"""A checkpoint resumes on any number of ranks, and under another strategy, with the same global batches."""

import shutil

import pytest

from tests.support import tiny
from tests.support.runs import metrics
from tests.support.small_run import arguments

EXACT = ["fsdp.mixed_precision.param_dtype=fp32", "trainer.total_training_steps=12", "trainer.max_ckpt_to_keep=null"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("elastic") / "model")


@pytest.fixture(scope="module")
def whole(warm, model, tmp_path_factory):
    """Twelve steps on two ranks, under `fsdp`."""
    folder = tmp_path_factory.mktemp("whole")
    end = warm.run(arguments(model, folder, *EXACT), ranks=2)
    assert end.code == 0, end.output
    return folder


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (1, "fsdp"),
        (4, "fsdp2"),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, "fsdp2"), (2, "fsdp"), (2, "fsdp2"), (4, "fsdp")]
        ],
    ],
)
def test_resume_on_other_ranks_and_strategy_has_the_same_losses(warm, model, whole, tmp_path, ranks, strategy):
    folder = tmp_path / "run"
    shutil.copytree(whole / "out", folder / "out")
    for path in (folder / "out/checkpoints").iterdir():
        if path.name != "step_2":
            shutil.rmtree(path)
    run = arguments(model, folder, *EXACT, "trainer.resume_from=auto", f"fsdp.strategy={strategy}")
    end = warm.run(run, ranks=ranks)
    assert end.code == 0 and "after step 2" in end.output, end.output
    expected, rows = metrics(whole / "out"), metrics(folder / "out")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for key in ("train/tokens", "train/supervised_tokens", "train/lr"):
        assert [row[key] for row in rows] == [row[key] for row in expected]
    assert [row["train/loss"] for row in rows] == pytest.approx([row["train/loss"] for row in expected], rel=1e-5)
    assert rows[-1]["val/loss"] == pytest.approx(expected[-1]["val/loss"], rel=1e-5)
