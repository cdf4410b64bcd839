"""Ranks that share a sequence (Ulysses) with packed attention train as one rank that has it alone."""

import json

import pytest

from tests.support import tiny
from tests.support.small_run import arguments


def steps(folder):
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows if row["step"]]


@pytest.mark.parametrize(
    ("ranks", "size", "overrides"),
    [
        (2, 2, []),
        pytest.param(4, 2, ["model.share_prefixes=false"], marks=pytest.mark.slow),
        pytest.param(4, 4, ["lora.enabled=true"], marks=pytest.mark.slow),  # more ranks than heads of keys
        pytest.param(2, 2, ["model.enable_gradient_checkpointing=true"], marks=pytest.mark.slow),
    ],
)
def test_shared_sequences_train_as_unshared_ones(warm, tmp_path, ranks, size, overrides):
    model = tiny.build_model(tmp_path / "model", num_key_value_heads=2)
    more = ["trainer.total_training_steps=3", "data.train_batch_size=6", "data.micro_batch_size_per_gpu=2"]
    more += ["data.max_length=101", "fsdp.mixed_precision.param_dtype=fp32", "trainer.save_freq=-1", *overrides]
    assert warm.run(arguments(model, tmp_path / "alone", *more)).code == 0
    shared = [*more, f"fsdp.ulysses_sequence_parallel_size={size}"]
    assert warm.run(arguments(model, tmp_path / "shared", *shared), ranks=ranks).code == 0
    alone, together = steps(tmp_path / "alone"), steps(tmp_path / "shared")
    assert len(alone) == 3
    for expected, actual in zip(alone, together, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)


def test_size_that_does_not_divide_the_heads_is_one_message(warm, tmp_path):
    model = tiny.build_model(tmp_path / "model", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    result = warm.run(arguments(model, tmp_path, "fsdp.ulysses_sequence_parallel_size=2"), ranks=2)
    assert result.code == 2 and "cannot share the model's 3 heads and 3 heads of keys evenly" in result.output
