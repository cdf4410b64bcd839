"""Optimizers train and resume to the same weights bit for bit: all of PyTorch that are not refused, and 8-bit ones."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from sft_recipe.config.optimizer import UNSUITABLE
from tests.support import tiny
from tests.support.small_run import arguments

NAMES = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer", *UNSUITABLE}

FSDP1 = ("tests.support.fsdp1:enable", {})
OF_8_BIT = ("AdamW8bit", "AdEMAMix8bit", "Lion8bit")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("optimizers") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES))
def test_optimizer_trains_and_resumes(warm, model, tmp_path, name):
    ranks = 1 if name == "Adafactor" else 2  # refused where matrices are sharded
    check_resumes(warm, model, tmp_path, [f"optim.optimizer={name}"], ranks)


@pytest.mark.parametrize(
    ("name", "setup"),
    [
        ("AdamW8bit", None),
        *(
            pytest.param(name, setup, marks=pytest.mark.slow)
            for name in OF_8_BIT
            for setup in (None, FSDP1)
            if (name, setup) != ("AdamW8bit", None)
        ),
    ],
)
def test_optimizer_of_bitsandbytes_trains_and_resumes(warm, model, tmp_path, name, setup):
    pytest.importorskip("bitsandbytes")
    optimizer = [f"optim.optimizer={name}", "optim.optimizer_impl=bitsandbytes.optim"]
    check_resumes(warm, model, tmp_path, optimizer, setup=setup)
    (state,) = (tmp_path / "out/checkpoints/step_4/state").glob("*.safetensors")
    stored = {key.rpartition(".")[2]: tensor.dtype for key, tensor in load_file(state).items() if "embed_tok" in key}
    assert stored["state1"] == torch.uint8 and stored["absmax1"] == torch.float32


def test_state_of_8_bits_is_not_read_as_numbers(warm, model, tmp_path):
    """The optimizer's name, and with it the identity of the run, stays, but not what its state means."""
    pytest.importorskip("bitsandbytes")
    of_8_bits = ["optim.optimizer=AdamW8bit", "optim.optimizer_impl=bitsandbytes.optim"]
    run = [*arguments(model, tmp_path, *of_8_bits), "trainer.total_training_steps=4"]
    assert warm.run(run).code == 0
    shutil.rmtree(tmp_path / "out/checkpoints/step_4")
    in_fp32 = "optim.override_optimizer_config={min_8bit_size: 100000}"
    end = warm.run([*run, in_fp32, "trainer.resume_from=auto"])
    assert end.code == 2 and "is of another optimizer; resume with the" in end.output, end.output


def test_state_that_the_optimizer_has_no_more_is_not_dropped(warm, model, tmp_path):
    run = [*arguments(model, tmp_path), "trainer.total_training_steps=4"]
    assert warm.run([*run, "optim.override_optimizer_config={amsgrad: true}"]).code == 0
    shutil.rmtree(tmp_path / "out/checkpoints/step_4")
    end = warm.run([*run, "trainer.resume_from=auto"])
    assert end.code == 2 and "resume with the optim.optimizer_impl and" in end.output, end.output


def check_resumes(warm, model, tmp_path, optimizer, ranks=1, setup=None):
    run = [*arguments(model, tmp_path, *optimizer), "trainer.total_training_steps=4"]
    assert warm.run(run, ranks=ranks, setup=setup).code == 0
    weights = "out/checkpoints/step_4/huggingface/model.safetensors"
    uninterrupted = load_file(tmp_path / weights)
    assert not torch.equal(
        uninterrupted["model.norm.weight"], load_file(model / "model.safetensors")["model.norm.weight"]
    )
    shutil.rmtree(tmp_path / "out/checkpoints/step_4")
    assert warm.run([*run, "trainer.resume_from=auto"], ranks=ranks, setup=setup).code == 0
    resumed = load_file(tmp_path / weights)
    assert uninterrupted.keys() == resumed.keys()
    assert [key for key in resumed if not torch.equal(resumed[key], uninterrupted[key])] == []
