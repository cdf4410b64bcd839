"""What the memory of a run depends on: the lengths of its examples and batches, and when it saves."""

import numpy as np
import pytest

from sft_recipe.config.compose import load_config
from sft_recipe.models.workload import Workload
from sft_recipe.training.schedule import workload_of

TWO_SETS = ["data.val_ratio=0.1", "trainer.test_freq=2"]


class Train:
    """Ten examples, the last one long."""

    lengths = np.array([10] * 9 + [100])

    def __len__(self) -> int:
        return len(self.lengths)


def found(*overrides: str) -> Workload:
    return workload_of(load_config(["data.train_batch_size=4", "trainer.total_epochs=2", *overrides]), Train())


def test_the_largest_batch_has_the_long_example():
    assert found() == Workload(longest=100, mean=(100 + 3 * 10) / 4, saves_before_end=True)
    assert found("data.train_batch_size=10").mean == 19
    # In the order of the file the long example comes in the third step, with one other.
    assert found("data.order=file", "trainer.total_training_steps=2").mean == 10
    assert found("data.order=file").mean == (100 + 10) / 4


def test_examples_that_are_padded_count_as_the_longest():
    assert found("data.max_target_length=50").mean == 100


@pytest.mark.parametrize(
    ("overrides", "saves"),
    [
        (["trainer.save_freq=-1"], False),
        (["trainer.save_freq=5"], True),
        (["trainer.save_freq=6"], False),  # the last one
        (["trainer.total_epochs=1"], False),
        (["trainer.total_epochs=1", *TWO_SETS], True),  # the best one
        (["trainer.total_epochs=1", *TWO_SETS, "trainer.save_best=false"], False),
    ],
)
def test_a_run_saves_before_its_end_where_a_save_is_due(overrides, saves):
    assert found(*overrides).saves_before_end is saves
