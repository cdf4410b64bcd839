"""Batches of a rank: planned one step ahead, the same in any order of asking, and on 1,024 ranks."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sft_recipe.config.compose import load_config
from sft_recipe.data.batching import batch_indices, plan_micro_batches
from sft_recipe.data.run_inputs import prepare
from sft_recipe.engine.cpu.platform import use_cpu
from tests.support import tiny

use_cpu()
from sft_recipe.training.batches import BatchBuilder  # noqa: E402
from sft_recipe.training.worker import Worker  # noqa: E402

EXAMPLES, BATCH_SIZE, BUDGET = 100, 24, 300


def builder(longest=200, rank=1, ranks=3):
    lengths = np.random.default_rng(0).integers(1, longest, EXAMPLES, endpoint=True)
    data = SimpleNamespace(train_batch_size=BATCH_SIZE, token_budget=BUDGET, has_targets=False, order="shuffle")
    config = SimpleNamespace(data=data, trainer=SimpleNamespace(seed=7))
    return BatchBuilder(config, _Lengths(lengths), None, rank, ranks)


class _Lengths:
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)


def planned(batches, steps):
    plans = []
    for step in steps:
        plans.append(batches.plan_step(step))
        batches.plan_ahead(step + 1)
    return [(plan.indices.tolist(), plan.lengths, plan.micro_batches, plan.token_efficiency) for plan in plans]


def test_a_resumed_run_has_the_plans_of_one_that_never_stopped():
    """Also where a step comes twice, or is left out."""
    complete = planned(builder(), range(1, 13))
    assert planned(builder(), range(8, 13)) == complete[7:]
    assert planned(builder(), [3, 3, 9, 1]) == [complete[2], complete[2], complete[8], complete[0]]


def test_plans_ahead_are_those_of_the_step_itself():
    batches = builder()
    for step in range(1, 13):
        plan = batches.plan_step(step)
        batches.plan_ahead(step + 1)
        indices = batch_indices(step - 1, EXAMPLES, BATCH_SIZE, 7)
        lengths = batches.train.lengths[indices]
        shares = list(plan_micro_batches(lengths, 3, BUDGET))
        assert plan.indices.tolist() == indices.tolist() and plan.lengths == lengths.tolist()
        assert plan.micro_batches == shares[1]
        fullest = max(sum(int(lengths[index]) for part in share for index in part) for share in shares)
        assert plan.token_efficiency == sum(plan.lengths) / 3 / fullest


def test_a_step_is_planned_in_a_thread_and_once(monkeypatch):
    calls, second = [], threading.Event()
    real = BatchBuilder.plan

    def plan(self, *given):
        calls.append(threading.current_thread())
        if len(calls) == 2:
            second.set()
        return real(self, *given)

    monkeypatch.setattr(BatchBuilder, "plan", plan)
    batches = builder()
    batches.plan_step(1)
    batches.plan_ahead(2)
    assert second.wait(60)  # without being asked for
    batches.plan_step(2)
    assert len(calls) == 2 and threading.main_thread() not in calls


def test_what_fails_in_the_thread_fails_the_step():
    with pytest.raises(ValueError, match="does not fit a micro-batch of 300"):
        builder(longest=3000).plan_step(1)


def test_1024_ranks_plan_build_and_train(tmp_path, monkeypatch):
    """In a process group that does not communicate: what other ranks would send stays away, so losses mean nothing."""
    ranks, batch_size, chosen = 1024, 4096, (0, 511, 1023)
    rng = np.random.default_rng(0)
    records = [rng.integers(3, 500, length).tolist() for length in rng.integers(4, 64, 5000)]
    texts = [json.dumps({"input_ids": ids, "labels": [-100, *ids[1:]]}) for ids in records]
    (tmp_path / "train.jsonl").write_text("\n".join(texts))
    tiny.build_model(tmp_path / "model")
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    for name, value in (launched | {"MASTER_ADDR": "node0"}).items():
        monkeypatch.setenv(name, str(value))
    config = load_config(
        [
            f"model.path={tmp_path}/model", f"data.train_files={tmp_path}/train.jsonl", "trainer.device=cpu",
            f"data.cache_dir={tmp_path}/cache", f"trainer.output_dir={tmp_path}/run", "trainer.n_gpus_per_node=8",
            "trainer.nnodes=128", "trainer.master_addr=node0", f"data.train_batch_size={batch_size}",
            "data.max_length=64", "data.micro_batch_size_per_gpu=2", "fsdp.mixed_precision.param_dtype=fp32",
        ]
    )  # fmt: skip
    inputs = prepare(config, 0, say=print)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        worker = Worker(config, inputs.model, 10, "cpu", lambda: None)
        assert (worker.data_rank, worker.data_ranks) == (0, ranks)
        builders = [BatchBuilder(config, inputs.train, 0, rank, ranks, worker.packs_documents) for rank in chosen]
        batches = [one.build(inputs.train, one.plan_step(1)) for one in builders]
        indices = batch_indices(0, len(records), batch_size, config.trainer.seed)
        shares = list(plan_micro_batches(inputs.train.lengths[indices], ranks, 128))
        assert sorted(index for share in shares for part in share for index in part) == list(range(len(indices)))
        for rank, batch in zip(chosen, batches, strict=True):
            documents = [records[indices[index]] for part in shares[rank] for index in part]
            assert [ids.tolist() for ids in batch["input_ids"].unbind()] == documents
            assert list(batch["micro_batch_docs"]) == [len(part) for part in shares[rank]]
        worker.set_step(0)
        assert "grad_norm" in worker.train(batches[0])
    finally:
        dist.destroy_process_group()
