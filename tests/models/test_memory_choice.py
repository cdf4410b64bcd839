"""What follows from the memory plan: recomputed activations, refused runs, and settings that would fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from sft_recipe.config.compose import load_config
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import PreflightError
from sft_recipe.models.memory_estimate import (
    GIB,
    MemoryEstimate,
    ModelDims,
    estimate_memory,
    estimate_run,
    options_that_fit,
)
from sft_recipe.models.stats import ModelStats
from sft_recipe.models.workload import Workload
from tests.support import tiny
from tests.support.runs import metrics, run_here
from tests.support.small_run import arguments

SMALL = ModelDims(layers=2, hidden=8, intermediate=16, vocabulary=32, heads=2, query=8, key=4)
LLAMA_DIMS = ModelDims(layers=32, hidden=4096, intermediate=14336, vocabulary=128256, heads=32, query=4096, key=1024)


@pytest.fixture
def choose(monkeypatch):
    """Return a function: the choice for SMALL on a device with that many bytes, and the messages."""
    use_cpu()
    from sft_recipe.models import memory_estimate
    from sft_recipe.models.stats import ModelStats

    def chosen(memory, *overrides, dims=SMALL):
        monkeypatch.setattr(memory_estimate, "device_memory", lambda device: memory)
        monkeypatch.setattr(memory_estimate.dist, "all_reduce", lambda tensor, op: None)
        compute = "fsdp.mixed_precision.param_dtype=bf16"
        config = load_config(["data.max_length=10", "data.train_batch_size=4", compute, *overrides])
        said: list[str] = []
        config, estimate = memory_estimate.resolve_activation_checkpointing(
            config, lambda changed: ModelStats(1000, 1000, dims), Workload(100, 100), "cuda", said.append
        )
        return config.model.enable_gradient_checkpointing, estimate, said

    return chosen


# 24,512 bytes are needed without, 22,880 with; nine tenths of a device are used.
@pytest.mark.parametrize(
    ("memory", "override", "expected", "warns"),
    [
        (27236, [], False, False),
        (27235, [], True, False),
        (25422, [], True, True),
        (27235, ["model.enable_gradient_checkpointing=false"], False, True),
        (10**6, ["model.enable_gradient_checkpointing=true"], True, False),
    ],
)
def test_checkpointing_is_on_only_where_memory_requires_it(choose, memory, override, expected, warns):
    chosen, estimate, said = choose(memory, *override)
    assert chosen is expected and isinstance(estimate, MemoryEstimate)
    assert bool(said) == warns and all("What would fit: " in text for text in said)
    if override == ["model.enable_gradient_checkpointing=false"] and said:
        assert "What would fit: model.enable_gradient_checkpointing=true." in said[0]


def test_run_does_not_start_when_weights_and_optimizer_state_exceed_the_device(choose):
    assert choose(12000)[0] is True
    with pytest.raises(PreflightError, match="weights and optimizer state exceed device memory.*--n_gpus"):
        choose(11999)


@pytest.mark.parametrize("case", [{"dims": None}, {"overrides": ["fsdp=megatron"]}])
def test_nothing_is_decided_without_an_estimate(choose, case):
    chosen, estimate, _ = choose(1, *case.pop("overrides", []), **case)
    assert (chosen, estimate) == ("auto", None)


def test_banner_shows_the_estimate():
    estimate = MemoryEstimate(
        weights=4 * GIB, unsharded=0, gradients=0, optimizer=0, activations=8 * GIB, recomputed=GIB, device=24 * GIB
    )
    assert estimate.describe(checkpointing=False) == "needs about 12.0 of 24.0 GiB"
    assert estimate.describe(checkpointing=True) == "needs about 5.0 of 24.0 GiB, 12.0 without"


def test_memory_of_a_cpu_rank_is_its_part_of_the_machine(monkeypatch):
    use_cpu()
    from sft_recipe.models import memory_estimate

    monkeypatch.setattr(memory_estimate, "total_memory", lambda: 6 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_estimate.device_memory("cpu") == 3 * GIB


def test_checkpointing_changes_no_number_and_may_change_on_resume(tmp_path, monkeypatch, capfd):
    model = tiny.build_model(tmp_path / "model")
    use_cpu()
    from sft_recipe.models import memory_estimate

    plans = []
    monkeypatch.setattr(
        memory_estimate, "estimate_memory", lambda *facts: plans.append(estimate_memory(*facts)) or plans[-1]
    )

    def run(folder: Path, memory: int, steps: int, *more: str) -> str:
        monkeypatch.setattr(memory_estimate, "device_memory", lambda device: memory)
        words = arguments(model, folder, "data.val_files=null", f"trainer.total_training_steps={steps}", *more)
        assert run_here(*words) == 0
        return " ".join(capfd.readouterr().out.split())

    assert "gradient checkpointing off (needs about" in run(tmp_path / "much", 2**40, 4)
    needed = int((plans[0].needed(checkpointing=False) + plans[0].needed(checkpointing=True)) / 2 / 0.9)
    assert "gradient checkpointing on (needs about" in run(tmp_path / "little", needed, 4)
    run(tmp_path / "both", 2**40, 2, "optim.lr_scheduler_type=constant")
    assert "gradient checkpointing on" in run(
        tmp_path / "both", needed, 4, "optim.lr_scheduler_type=constant", "trainer.resume_from=auto"
    )
    rows = [[row["train/loss"] for row in metrics(tmp_path / name / "out")] for name in ("much", "little")]
    assert rows[0] == rows[1] and len(metrics(tmp_path / "both" / "out")) == 4


def test_weights_in_4_bits_take_half_a_byte_and_their_scales():
    """By hand: 16,384 of 20,000 frozen weights in 4 bits, with 50 trained ones; scales are 1/64 + 4 / (64 * 256)."""
    stats = ModelStats(20050, 50, SMALL, quantized=16384)
    plain = ["lora.enabled=true", "fsdp.strategy=fsdp2", "data.train_batch_size=4", "data.max_length=10"]
    for ranks in (1, 2):
        overrides = [*plain, f"trainer.n_gpus_per_node={ranks}", "fsdp.mixed_precision.param_dtype=bf16"]
        lora = estimate_run(load_config(overrides), stats, Workload(10, 10), "cuda", 10**6)
        qlora = estimate_run(load_config([*overrides, "lora.quantize=true"]), stats, Workload(10, 10), "cuda", 10**6)
        scales = 16384 // 64 + 4
        assert qlora.weights == lora.weights - (16384 * 2 - 16384 // 2) // ranks + scales
        # All of two layers are gathered; the largest matrix that is dequantized is 8 x 16.
        assert qlora.unsharded == lora.unsharded - (16384 * 2 - 16384 // 2) + 2 * 8 * 16
        assert (qlora.activations, qlora.optimizer, qlora.gradients) == (
            lora.activations, lora.optimizer, lora.gradients,
        )  # fmt: skip
        assert qlora.loading == 16384 // 2 + scales + 2 * (20000 - 16384) + 4 * 50
        large = replace(qlora, loading=10**9)
        assert large.needed(True) == large.needed(False) == 10**9


def test_qlora_is_advised_where_lora_does_not_fit():
    found = []
    stats = {False: ModelStats(8 * 10**9, 8 * 10**9, LLAMA_DIMS), True: ModelStats(8 * 10**9, 2 * 10**7, LLAMA_DIMS)}

    def stats_of(config):
        found.append(config.lora.quantize)
        known = stats[config.lora.enabled]
        return replace(known, quantized=7 * 10**9) if config.lora.quantize else known

    config = load_config(["data.max_length=512", "fsdp.mixed_precision.param_dtype=bf16"])
    options = options_that_fit(config, stats_of, Workload(512, 512), "cuda", 12 * GIB)
    assert "--use_qlora --strategy fsdp2" in options and "--use_lora" not in options and True in found
    assert "--use_lora" in options_that_fit(config, stats_of, Workload(512, 512), "cuda", 24 * GIB)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_lengths_that_would_fit_do_so_with_the_configured_checkpointing(checkpointing):
    stats, lengths, memory = ModelStats(10**9, 10**9, LLAMA_DIMS), Workload(2**16, 2**16), 40 * GIB
    words = ["fsdp.mixed_precision.param_dtype=bf16", "data.train_batch_size=1"]
    choice = f"model.enable_gradient_checkpointing={str(checkpointing).lower()}"
    config = load_config([*words, choice, f"data.max_length={lengths.longest}"])
    options = options_that_fit(config, lambda _: stats, lengths, "cuda", memory)
    [length] = [int(option.split()[1]) for option in options if option.startswith("--max_length ")]
    shorter, longer = (load_config([*words, f"data.max_length={size}"]) for size in (length, 2 * length))
    assert estimate_run(shorter, stats, lengths, "cuda", memory).fits(checkpointing)
    assert not estimate_run(longer, stats, lengths, "cuda", memory).fits(checkpointing)
