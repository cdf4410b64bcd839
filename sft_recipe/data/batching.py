"""Plans which examples a step trains, on which rank and in which micro-batch: arithmetic on lengths, no state."""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache
from heapq import heappop, heappush, heapreplace

import numpy as np

# Positions within the step's batch; an empty micro-batch keeps ranks in step.
MicroBatch = list[int]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of optimizer steps in one epoch; a last, partial batch is one more step."""
    return math.ceil(examples / batch_size)


def batch_indices(step: int, examples: int, batch_size: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Return the example numbers of optimizer step `step` (from 0), int64 of shape (at most batch_size,).

    The result depends only on the arguments, not on ranks, packing or interruptions.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(examples, batch_size))
    start = step_in_epoch * batch_size
    return epoch_order(examples, seed, epoch, shuffle)[start : start + batch_size]


@lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return a permutation of all examples, int64, that depends only on (seed, epoch); file order without `shuffle`.

    The array is cached and read-only.
    """
    order = np.random.default_rng([seed, epoch]).permutation(examples) if shuffle else np.arange(examples)
    order.flags.writeable = False
    return order


def sample_mixture(sources: Sequence[tuple[int, int]], seed: int) -> np.ndarray:
    """Return the example numbers of an epoch, int64, for sources whose examples are numbered consecutively.

        sources [(4, 2), (2, 5)]  ->  two of 0..3, and 4 4 4 5 5 or 4 4 5 5 5

    Each source is (examples, target count): every example is taken target // examples times, and the rest is drawn
    without replacement, seeded.
    """
    numbers: list[np.ndarray] = []
    begin = 0
    for place, (examples, target_count) in enumerate(sources):
        times, rest = divmod(target_count, examples)
        counts = np.full(examples, times)
        counts[np.random.default_rng([seed, 2**31 + 1, place]).permutation(examples)[:rest]] += 1
        numbers.append(begin + np.repeat(np.arange(examples), counts))
        begin += examples
    return np.concatenate(numbers)


def split_validation(digests: np.ndarray, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeded split into training and validation places, each in order; equal examples are on the same side.

    Both have at least one example, but where all are equal: then nothing is held out.
    """
    _, group = np.unique(digests, return_inverse=True)
    groups = int(group.max()) + 1
    held_out = min(max(1, round(groups * ratio)), groups - 1)
    is_chosen = np.zeros(groups, dtype=bool)
    is_chosen[np.random.default_rng([seed, 2**31]).permutation(groups)[:held_out]] = True
    return np.flatnonzero(~is_chosen[group]), np.flatnonzero(is_chosen[group])


def plan_micro_batches(
    lengths: Sequence[int], ranks: int, budget: int, packs_documents: bool = True
) -> list[list[MicroBatch]]:
    """Share one batch among ranks and pack each share into micro-batches.

        lengths 700 300 600 400, 2 ranks, budget 1000  ->  rank 0: [[0, 1]]   rank 1: [[2, 3]]

    Ranks are balanced in tokens (longest first, to the least loaded rank); no micro-batch holds more than `budget`
    tokens, and without `packs_documents` none more than one example; all ranks have the same number of micro-batches,
    some of them empty where examples are too few.

    Raises ValueError where one example alone is longer than the budget.
    """
    if len(lengths) and max(lengths) > budget:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit a micro-batch of {budget}")
    counts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap: the least loaded rank first, the lowest of equals
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # equals keep their order
        load, rank = loads[0]
        counts[rank].append(index)
        heapreplace(loads, (load + lengths[index], rank))
    packed = [_pack(share, lengths, budget) if packs_documents else [[index] for index in share] for share in counts]
    count = max(1, max(len(bins) for bins in packed))
    return [_split_until(bins, count, lengths) for bins in packed]


def _pack(share: list[int], lengths: Sequence[int], budget: int) -> list[MicroBatch]:
    """Best-fit decreasing: each to the bin that it fills most; `share` comes longest first."""
    bins: list[MicroBatch] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), in order, so that the bin is found by bisection
    for index in share:
        place = bisect_left(rooms, (lengths[index], 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = budget, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(rooms, (room - lengths[index], number))
    return bins


def _split_until(bins: list[MicroBatch], count: int, lengths: Sequence[int]) -> list[MicroBatch]:
    """Halve the fullest micro-batch until there are `count`; what cannot be halved is filled up with empty ones."""
    if len(bins) == count:
        return bins
    bins = list(bins)
    fullest: list[tuple[int, int]] = []  # a heap of (minus tokens, bin): the fullest first, of those with two or more

    def offer(number: int) -> None:
        if len(bins[number]) > 1:
            heappush(fullest, (-sum(lengths[index] for index in bins[number]), number))

    for number in range(len(bins)):
        offer(number)
    while fullest and len(bins) < count:
        _, number = heappop(fullest)
        bins[number], half = bins[number][0::2], bins[number][1::2]
        bins.append(half)
        offer(number)
        offer(len(bins) - 1)
    return bins + [[] for _ in range(count - len(bins))]
