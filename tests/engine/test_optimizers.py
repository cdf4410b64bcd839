"""Every optimizer of PyTorch that is not refused trains, and resumes to the same weights bit for bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from sft_recipe.config.optimizer import UNSUITABLE
from tests.support import tiny
from tests.support.small_run import arguments

NAMES = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer", *UNSUITABLE}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("optimizers") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES))
def test_optimizer_trains_and_resumes(warm, model, tmp_path, name):
    ranks = 1 if name == "Adafactor" else 2  # refused where matrices are sharded
    run = [*arguments(model, tmp_path, f"optim.optimizer={name}"), "trainer.total_training_steps=4"]
    assert warm.run(run, ranks=ranks).code == 0
    weights = "out/checkpoints/step_4/huggingface/model.safetensors"
    uninterrupted = load_file(tmp_path / weights)
    assert not torch.equal(
        uninterrupted["model.norm.weight"], load_file(model / "model.safetensors")["model.norm.weight"]
    )
    shutil.rmtree(tmp_path / "out/checkpoints/step_4")
    assert warm.run([*run, "trainer.resume_from=auto"], ranks=ranks).code == 0
    resumed = load_file(tmp_path / weights)
    assert uninterrupted.keys() == resumed.keys()
    assert [key for key in resumed if not torch.equal(resumed[key], uninterrupted[key])] == []
