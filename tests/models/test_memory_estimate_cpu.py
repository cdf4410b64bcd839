"""What a CPU rank needs beside a step: the program, copies and export of a save, gradients that ranks add up."""

import torch

from sft_recipe.config.compose import load_config
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.models.dims import ModelDims

DEEP = ModelDims(layers=20, hidden=8, intermediate=16, vocabulary=32, heads=2, query=8, key=4)


def cpu_estimate(*overrides, total=10_000, trainable=10_000, stored=torch.bfloat16, memory=10**12, **workload):
    use_cpu()
    from sft_recipe.models.memory_estimate import estimate_run
    from sft_recipe.models.stats import ModelStats
    from sft_recipe.models.workload import Workload

    compute = ["fsdp.mixed_precision.param_dtype=bf16", "data.max_length=10", "data.train_batch_size=1"]
    stats = ModelStats(total, trainable, DEEP, stored=stored)
    return estimate_run(load_config([*compute, *overrides]), stats, Workload(10, 10, **workload), "cpu", memory)


# Of ten tokens: the last norm, the head's input and its gradient; logits; and the gradient of the head, all in bf16.
ENDS, LOGITS, HEAD_GRADIENT = 10 * 3 * 2 * 8, 2 * 10 * 32, 2 * 32 * 8


def test_a_cpu_rank_also_has_the_program_and_saves():
    from sft_recipe.models.memory_estimate import GAPS, PROGRAM

    found = cpu_estimate()
    # Exported in bf16; copies of weights and two moments in fp32.
    assert (found.export, found.copies, found.program) == (2 * 10_000, 3 * 4 * 10_000, PROGRAM)
    rest = found.weights + found.unsharded + found.gradients + found.optimizer + found.export + found.copies
    assert found.needed(checkpointing=False) == rest + found.activations + found.program
    layers = 10 * 20 * DEEP.activation_bytes_per_token(2, on_cpu=True, is_unsharded=True)
    assert found.activations == int((1 + GAPS) * (layers + ENDS + LOGITS + HEAD_GRADIENT))
    assert cpu_estimate(stored=torch.float32).export == 4 * 10_000
    assert cpu_estimate("trainer.async_save=false").copies == 0
    adapters = cpu_estimate("lora.enabled=true", trainable=50)
    assert (adapters.export, adapters.copies) == (0, 3 * 4 * 50)
    assert cpu_estimate("lora.enabled=true", "lora.merge=true", trainable=50).export == (4 + 2 + 4) * 10_000


def test_a_run_that_saves_at_its_end_only_has_no_activations_then():
    meanwhile = cpu_estimate()
    saved = meanwhile.export + meanwhile.copies
    at_end = cpu_estimate(saves_before_end=False)
    smaller = min(saved, meanwhile.activations)
    assert at_end.needed(checkpointing=False) == meanwhile.needed(checkpointing=False) - smaller
    parts = at_end.parts(checkpointing=False), meanwhile.parts(checkpointing=False)
    assert len(parts[0]) <= len(parts[1])
    # Copies that do not fit beside the activations of a later step fit where there are none.
    memory = int((meanwhile.needed(checkpointing=False) - 1) / 0.9)
    small = cpu_estimate(memory=memory), cpu_estimate(memory=memory, saves_before_end=False)
    assert small[0].needed(False) == meanwhile.needed(False) - meanwhile.copies
    assert small[1].needed(False) == at_end.needed(False)


def test_copies_do_not_count_where_they_do_not_fit_and_saving_blocks():
    found = cpu_estimate()
    without = found.needed(checkpointing=False) - found.copies
    small = cpu_estimate(memory=int(without / 0.9) + 1000)
    assert small.needed(checkpointing=False) <= without and small.fits(checkpointing=False)
    parts = small.parts(checkpointing=False)
    assert "copies to save" not in parts and parts["program"].startswith("0.5")


def test_frozen_weights_that_are_mapped_from_their_file_must_fit_but_are_not_needed():
    found = cpu_estimate("lora.enabled=true", trainable=50)
    assert (found.weights, found.mapped) == (4 * 50, 2 * 9_950)
    enough = found.needed(checkpointing=False) + found.mapped
    assert cpu_estimate("lora.enabled=true", trainable=50, memory=int(enough / 0.9) + 1).fits(checkpointing=False)
    assert not cpu_estimate("lora.enabled=true", trainable=50, memory=int((enough - 5_000) / 0.9)).fits(False)
    # Weights that are converted, trained or divided among ranks are not mapped.
    for converted in (
        cpu_estimate("lora.enabled=true", trainable=50, stored=torch.float32),
        cpu_estimate("lora.enabled=true", "trainer.n_gpus_per_node=2", "data.train_batch_size=4", trainable=50),
    ):
        assert converted.mapped == 0 and converted.weights > 4 * 50


def test_what_cpu_ranks_exchange_at_a_time_takes_the_place_of_logits():
    """By hand: embeddings and head have 2 x 32 x 8 weights, whose gradients are added up, with a copy, in fp32."""
    from sft_recipe.models.memory_estimate import GAPS

    ranks = ["trainer.n_gpus_per_node=2", "data.train_batch_size=4"]
    outside, layer = 2 * 32 * 8, 10 * DEEP.activation_bytes_per_token(2, on_cpu=True, is_unsharded=False)
    total = 20 * 8 * (2 * 8 + 2 * 4 + 3 * 16) + outside
    full = cpu_estimate(*ranks, total=total, trainable=total)
    without = int((1 + GAPS) * (20 * layer + ENDS + LOGITS + HEAD_GRADIENT))
    assert full.activations == without + 4 * (outside + outside // 2) - LOGITS - HEAD_GRADIENT
    adapters = cpu_estimate(*ranks, "lora.enabled=true", total=total, trainable=50)
    # With adapters a layer more; its weights are gathered in bf16.
    assert adapters.activations == int((1 + GAPS) * (21 * layer + ENDS + LOGITS)) + 2 * outside - LOGITS
    assert full.gradients == 4 * total and adapters.gradients == 4 * 50
