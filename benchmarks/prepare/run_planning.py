"""python run_planning.py LENGTHS.npy EXAMPLES RANKS BATCH_SIZE BUDGET: plan one epoch, then see how even it is."""

import sys

import numpy as np
from clock import tell

from sft_recipe.data.batching import batch_indices, plan_micro_batches

lengths_file, *numbers = sys.argv[1:]
examples, ranks, batch_size, budget = map(int, numbers)
rng = np.random.default_rng(0)
lengths = rng.choice(np.load(lengths_file), examples).astype(np.int64)
full_steps, rest = divmod(examples, batch_size)


def plan(step: int) -> tuple[np.ndarray, list]:
    of_step = lengths[batch_indices(step, examples, batch_size, seed=0)]
    return of_step, plan_micro_batches(of_step.tolist(), ranks, budget)


def largest_over_mean(tokens_of_ranks: np.ndarray) -> float:
    return float(tokens_of_ranks.max() / tokens_of_ranks.mean())


tell("begin")
for step in range(full_steps + bool(rest)):
    plan(step)
tell("ready", examples=examples)

planned, random = [], []
for step in range(full_steps):
    of_step, shares = plan(step)
    planned.append(largest_over_mean(np.array([of_step[sum(share, [])].sum() for share in shares])))
    random.append(largest_over_mean(rng.permutation(of_step).reshape(ranks, -1).sum(axis=1)))
for name, ratios in (("planned", planned), ("random", random)):
    tell(name, **{f"{name}_mean": float(np.mean(ratios)), f"{name}_worst": max(ratios)})
