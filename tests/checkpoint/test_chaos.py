"""A run that is killed again and again ends as one that never stopped, bit for bit."""

import pytest

from tests.support import tiny
from tests.support.chaos import PHASES, survive
from tests.support.small_run import arguments, checkpoints

KILLS = 14  # of each shape
SHAPE_CACHE_SIZES = {
    "full": ["fsdp.strategy=fsdp2", "trainer.async_save=false"],
    "lora-beside-training": ["fsdp.strategy=fsdp", "lora.enabled=true", "lora.merge=true"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("chaos") / "model", attention_dropout=0.1)


@pytest.mark.parametrize("shape", SHAPE_CACHE_SIZES)
def test_killed_in_every_phase_a_run_ends_as_one_that_never_stopped(warm, model, shape, tmp_path):
    whole = tmp_path / "whole"
    end = warm.run(arguments(model, whole, *SHAPE_CACHE_SIZES[shape]), ranks=2)
    assert end.code == 0, end.said
    killed = tmp_path / "killed"
    run = arguments(model, killed, *SHAPE_CACHE_SIZES[shape])
    survived = survive(warm, run, whole / "out", killed / "out", seed=len(shape), limit=KILLS)
    assert not survived.differences
    assert survived.count == KILLS and survived.kills.keys() >= PHASES.keys()
    assert all(name.startswith("step_") for name in checkpoints(killed))
