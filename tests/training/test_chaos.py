"""A run that is killed again and again ends as one that never stopped, bit for bit."""

import json

import pytest

from tests import tiny
from tests.chaos import PHASES, survive
from tests.warm import Warm

KILLS = 15  # of each shape
SHAPES = {
    "full": ["fsdp.strategy=fsdp2"],
    "lora-beside-training": ["fsdp.strategy=fsdp", "lora.enabled=true", "lora.merge=true", "trainer.async_save=true"],
}


@pytest.fixture(scope="module")
def warm():
    with Warm() as process:
        yield process


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("chaos") / "model", attention_dropout=0.1)


def arguments(model, folder, *extra):
    """Two epochs of five steps, a checkpoint after every other one, validation at an epoch's end."""
    records = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}. " * (1 + i % 5)} for i in range(22)]
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(records[:18]))
    (folder / "val.json").write_text(json.dumps(records[18:]))
    return [
        f"model.path={model}",
        f"data.train_files={folder}/train.json",
        f"data.val_files={folder}/val.json",
        f"data.cache_dir={folder}/cache",
        f"trainer.output_dir={folder}/out",
        "trainer.device=cpu",
        "trainer.total_epochs=2",
        "trainer.save_freq=2",
        "optim.lr=1e-2",
        *extra,
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_in_every_phase_a_run_ends_as_one_that_never_stopped(warm, model, shape, tmp_path):
    whole = tmp_path / "whole"
    end = warm.run(arguments(model, whole, *SHAPES[shape]), ranks=2)
    assert end.code == 0, end.said
    killed = tmp_path / "killed"
    run = arguments(model, killed, *SHAPES[shape])
    survived = survive(warm, run, whole / "out", killed / "out", seed=len(shape), limit=KILLS)
    assert not survived.differences
    assert survived.count == KILLS and survived.kills.keys() >= PHASES.keys()
    left = [path.name for path in (killed / "out/checkpoints").iterdir()]
    assert all(name.startswith("step_") for name in left), left
