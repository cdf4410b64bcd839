"""python run_step_path.py EXAMPLES RANKS BATCH_SIZE BUDGET STEPS: order and plan, then how long steps wait for plans.

A step is half a second of small operations, started one by one, so that whatever a thread beside it takes of the
interpreter shows. Every other step begins when the next plan is made, and has no thread beside it.
"""

import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from clock import tell

from sft_recipe.engine.cpu.platform import use_cpu

use_cpu()

import torch  # noqa: E402

from sft_recipe.data.batching import sample_mixture  # noqa: E402
from sft_recipe.data.token_store import Examples  # noqa: E402
from sft_recipe.training.batches import BatchBuilder  # noqa: E402

STEP_SECONDS = 0.5


class Store:
    """Examples with lengths of conversations: half are below 400 tokens, one in a hundred is above 3,200."""

    def __init__(self, examples: int):
        self.lengths = np.random.default_rng(0).lognormal(6, 0.9, examples).clip(8, 4096).astype(np.int64)
        self.ids, self.mask = np.ones(4096, np.int32), np.ones(4096, np.uint8)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[: self.lengths[index]], self.mask[: self.lengths[index]]


def main() -> None:
    examples, ranks, batch_size, budget, steps = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    data = SimpleNamespace(
        train_batch_size=batch_size, token_budget=budget, has_targets=False, order="shuffle", micro_batch_size_per_gpu=1
    )
    store: Any = Store(examples)
    config: Any = SimpleNamespace(data=data, trainer=SimpleNamespace(seed=0))
    tell("begin")
    cpu = time.process_time()
    train = Examples(store, sample_mixture([(examples, examples)], 0))
    builder = BatchBuilder(config, train, 0, rank=0, ranks=ranks)
    plan = builder.plan_step(1)
    tell("ready", examples=examples, cpu=time.process_time() - cpu)
    builder.plan_step(2)  # all is in memory
    builder.plan_ahead(3)
    matrix, operations = torch.ones(64, 64), 0
    until = time.perf_counter() + STEP_SECONDS
    while time.perf_counter() < until:
        matrix = torch.tanh(matrix)
        operations += 1
    measured: dict[str, list[float]] = {"wait": [], "build": [], "beside": [], "alone": []}
    for step in range(3, 3 + 2 * steps):
        started = time.perf_counter()
        plan = builder.plan_step(step)
        measured["wait"].append(time.perf_counter() - started)
        cpu = time.thread_time()
        builder.build(train, plan)
        measured["build"].append(time.thread_time() - cpu)
        builder.plan_ahead(step + 1)
        is_planned = step % 2
        if is_planned:
            time.sleep(STEP_SECONDS)  # the next plan is made meanwhile
        started = time.perf_counter()
        for _ in range(operations):
            matrix = torch.tanh(matrix)
        measured["alone" if is_planned else "beside"].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in measured.items()}
    tell("measured", worst_wait=max(measured["wait"]), **medians)


if __name__ == "__main__":
    main()
