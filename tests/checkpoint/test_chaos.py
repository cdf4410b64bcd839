"""A run that is killed again and again ends as one that never stopped, bit for bit."""

import pytest

from tests.support import tiny
from tests.support.chaos import PHASES, kill_and_resume
from tests.support.small_run import arguments, checkpoints

KILLS = 14  # of each variant
VARIANTS = {
    "full": ["fsdp.strategy=fsdp2", "trainer.async_save=false"],
    "lora-async": ["fsdp.strategy=fsdp", "lora.enabled=true", "lora.merge=true"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("chaos") / "model", attention_dropout=0.1)


@pytest.mark.parametrize("variant", [pytest.param("full", marks=pytest.mark.slow), "lora-async"])
def test_run_killed_in_every_phase_resumes_bit_for_bit(warm, model, variant, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    end = warm.run(arguments(model, uninterrupted, *VARIANTS[variant]), ranks=2)
    assert end.code == 0, end.output
    killed = tmp_path / "killed"
    run = arguments(model, killed, *VARIANTS[variant])
    report = kill_and_resume(warm, run, uninterrupted / "out", killed / "out", seed=len(variant), limit=KILLS)
    assert not report.differences
    assert report.count == KILLS and report.kills.keys() >= PHASES.keys()
    assert all(name.startswith("step_") for name in checkpoints(killed))
