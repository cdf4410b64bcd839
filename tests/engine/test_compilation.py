"""Layers that torch.compile has compiled, against the same runs without: losses, gradients, resumes, recompilations.

The quick tests trace with Dynamo and run what it captured in eager mode; the slow ones compile with Inductor, for which
they need a C++ compiler.
"""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from sft_recipe.config import preflight
from sft_recipe.config.compose import load_config
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import ConfigError, PreflightError
from tests.support import fsdp1, seq2seq, tiny
from tests.support.runs import metrics, run_here

STEPS = 6
COMPILED = "fsdp.use_torch_compile=true"
VARIANTS = {
    "full": [],
    "bf16": ["fsdp.mixed_precision.param_dtype=bf16"],
    "checkpointing": ["model.enable_gradient_checkpointing=true"],
    "lora": ["lora.enabled=true"],
    "fsdp2": ["fsdp.strategy=fsdp2"],
    "fsdp2_checkpointing": ["fsdp.strategy=fsdp2", "model.enable_gradient_checkpointing=true"],
    "fsdp2_lora": ["fsdp.strategy=fsdp2", "lora.enabled=true"],
}
HAS_COMPILER = bool(shutil.which("g++") or shutil.which("clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="Inductor needs a C++ compiler for CPUs")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return a function that trains in this process; it returns the run folder and the graphs compiled by each step."""
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine
    from sft_recipe.training.worker import Worker

    folder = tmp_path_factory.mktemp("compilation")
    tiny.build_model(folder / "model", num_hidden_layers=3)
    draw = random.Random(0)
    lengths = [(draw.randint(1, 60), draw.randint(1, 30)) for _ in range(4 * STEPS)]
    records = [{"prompt": "x " * prompt, "response": "Hello there. " * response} for prompt, response in lengths]
    (folder / "data.json").write_text(json.dumps(records))
    base = [
        f"model.path={folder}/model", f"data.train_files={folder}/data.json", f"data.cache_dir={folder}/cache",
        "data.max_length=512", "data.train_batch_size=4", "fsdp.mixed_precision.param_dtype=fp32", "optim.lr=1e-3",
        f"trainer.total_training_steps={STEPS}", "trainer.device=cpu",
    ]  # fmt: skip

    def run(name, *arguments, backend="eager") -> tuple[Path, list[int]]:
        torch._dynamo.reset()
        counters.clear()
        graphs = []

        def step(worker, batch, train=Worker.train):
            result = train(worker, batch)
            graphs.append(counters["stats"]["unique_graphs"])
            return result

        is_unsharded = "fsdp.strategy=fsdp2" not in arguments
        with (
            patch.object(torch, "compile", partial(torch.compile, backend=backend)),
            patch.object(Worker, "train", step),
            patch.object(SFTEngine, "is_unsharded", staticmethod(lambda: is_unsharded)),
        ):
            assert run_here(*base, *arguments, f"trainer.output_dir={folder}/{name}") == 0
        return folder / name, graphs

    run.base = base
    return run


def trace(rank: int, uses_fsdp1: bool) -> None:
    """Make this rank compile without Inductor; a `setup` of warm.run."""
    torch.compile = partial(torch.compile, backend="eager")
    if uses_fsdp1:
        fsdp1.enable(rank)


def check_equal(run, expected, rtol=1e-5):
    """The losses and gradient norms of all steps, and the trained weights."""
    for row, other in zip(metrics(run), metrics(expected), strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=rtol)
    [path] = (run / f"checkpoints/step_{STEPS}/huggingface").glob("*.safetensors")
    weights = load_file(expected / path.relative_to(run))
    for name, weight in load_file(path).items():
        torch.testing.assert_close(weight, weights[name], rtol=rtol, atol=rtol)


QUICK = ("full", "checkpointing", "fsdp2_lora")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_a_traced_run_equals_an_eager_one_and_traces_a_few_graphs_for_all_lengths(train, variant):
    rounding = 2e-2 if variant == "bf16" else 1e-5
    arguments = VARIANTS[variant]
    expected, none = train(f"eager_{variant}", *arguments)
    run, graphs = train(f"traced_{variant}", *arguments, COMPILED)
    assert len({row["train/tokens"] for row in metrics(run)}) == STEPS
    assert none == [0] * STEPS and 0 < graphs[1] == graphs[-1] <= 16
    check_equal(run, expected, rounding)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_two_ranks_that_trace_equal_one_that_does_not(train, warm, strategy):
    expected, _ = train(f"eager_for_{strategy}")
    run = expected.with_name(f"traced_two_{strategy}")
    setup = ("tests.engine.test_compilation:trace", {"uses_fsdp1": strategy == "fsdp"})
    end = warm.run([*train.base, COMPILED, f"fsdp.strategy={strategy}", f"trainer.output_dir={run}"], 2, setup)
    assert end.code == 0, end.output
    check_equal(run, expected)


def test_validation_and_answers_are_those_of_an_eager_run(train):
    validation, answers = ["data.val_ratio=0.2", "trainer.test_freq=2"], ["eval.generate=2", "eval.max_new_tokens=4"]
    expected, _ = train("eager_val", *validation, *answers)
    _, without_answers = train("traced_val_loss", *validation, COMPILED)
    run, graphs = train("traced_val", *validation, *answers, COMPILED)
    assert graphs == without_answers and graphs[-1] <= 16
    names = ("val/loss", "eval/bleu4", "eval/rouge_l")
    found, wanted = ([row[name] for row in metrics(each) for name in names if name in row] for each in (run, expected))
    assert len(found) >= STEPS and found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_an_encoder_decoder_is_traced_too(train, tmp_path):
    model = f"model.path={seq2seq.build_model(tmp_path / 't5')}"
    expected, _ = train("eager_t5", model)
    run, graphs = train("traced_t5", model, COMPILED)
    assert 0 < graphs[1] == graphs[-1] <= 40
    check_equal(run, expected)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "fsdp2_checkpointing", "lora"])
def test_a_compiled_run_equals_an_eager_one(train, variant):
    arguments = VARIANTS[variant]
    expected, _ = train(f"plain_{variant}", *arguments)
    run, graphs = train(f"compiled_{variant}", *arguments, COMPILED, backend="inductor")
    assert graphs[-1] > 0
    check_equal(run, expected)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_that_was_resumed_equals_an_uninterrupted_one(train):
    saving = ["trainer.save_freq=3", COMPILED]
    expected, _ = train("uninterrupted", *saving, backend="inductor")
    checkpoint = expected / "checkpoints/step_3"
    run, _ = train("resumed", *saving, f"trainer.resume_from={checkpoint}", backend="inductor")
    rows = metrics(expected)[3:]
    assert [row["train/loss"] for row in metrics(run)] == [row["train/loss"] for row in rows]
    assert [row["train/grad_norm"] for row in metrics(run)] == [row["train/grad_norm"] for row in rows]


@pytest.mark.parametrize(
    ("device", "missing", "texts"),
    [
        ("cpu", {"g++", "clang++", "CXX"}, ["lacks g++ or clang++ (apt-get install g++); install it, or set it to"]),
        ("cuda", {"gcc", "clang", "CC"}, ["gcc or clang"]),
        ("cuda", {"triton"}, ["triton (", "pip install triton)"]),
        ("cpu", {"Python.h"}, ["Python.h (apt-get install python3-dev)"]),
    ],
)
def test_without_what_it_compiles_with_the_run_is_refused(monkeypatch, tmp_path, device, missing, texts):
    config = load_config([COMPILED])
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(preflight, "check_config", lambda *_: None)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(preflight, "is_installed", lambda name: True)
    preflight.check(config, device)
    if "Python.h" in missing:
        (tmp_path / "Python.h").unlink()
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None if name in missing else name)
    monkeypatch.setattr(preflight, "is_installed", lambda name: name not in missing)
    with pytest.raises(PreflightError, match="fsdp.use_torch_compile=true lacks") as caught:
        preflight.check(config, device)
    assert [text for text in texts if text not in str(caught.value)] == []


def test_megatron_is_refused():
    with pytest.raises(ConfigError, match="fsdp.use_torch_compile needs FSDP"):
        load_config([COMPILED, "fsdp.strategy=megatron"])
