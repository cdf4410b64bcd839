"""The heap of a CPU rank: large tensors are outside of it, and its free pages are returned when a phase ends."""

import json
import platform

import pytest
import torch

from sft_recipe.engine.cpu.platform import LARGEST_ON_HEAP, trim_heap, use_cpu
from sft_recipe.engine.cpu.process_memory import process_memory
from tests.support import tiny
from tests.support.runs import run_here
from tests.support.small_run import arguments

MIB = 2**20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other heaps")


def filled(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8)


def test_a_large_tensor_is_returned_to_the_system_as_soon_as_it_is_free():
    use_cpu()
    before = process_memory()
    tensor = filled(256 * MIB)
    assert process_memory() > before + 240 * MIB
    del tensor
    assert process_memory() < before + 16 * MIB


def test_small_tensors_stay_on_the_heap_until_it_is_trimmed():
    use_cpu()
    trim_heap()
    before = process_memory()
    tensors = [filled(LARGEST_ON_HEAP // 2) for _ in range(16)]
    last = tensors.pop()  # of the heap, so that those before it are holes
    tensors.clear()
    assert process_memory() > before + 128 * MIB
    trim_heap()
    assert process_memory() < before + 64 * MIB and last.sum() == LARGEST_ON_HEAP // 2


def test_a_run_trims_the_heap_before_its_steps_and_after_each_evaluation(tmp_path, monkeypatch):
    from sft_recipe.engine.cpu import platform as cpu
    from sft_recipe.training.trainer import SFTTrainer

    done = []
    step = SFTTrainer.train_step
    monkeypatch.setattr(SFTTrainer, "train_step", lambda self, number: done.append(number) or step(self, number))
    monkeypatch.setattr(cpu, "trim_heap", lambda: done.append("trimmed"))
    model = tiny.build_model(tmp_path / "model")
    words = ["trainer.total_training_steps=3", "trainer.test_freq=2", "trainer.save_freq=-1"]
    assert run_here(*arguments(model, tmp_path, *words)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if "val/loss" in row]
    assert evaluated == [0, 2, 3]
    assert done == ["trimmed", "trimmed", 1, 2, "trimmed", 3, "trimmed"]
