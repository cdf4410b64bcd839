"""Plans which examples a step trains, on which rank and in which micro-batch: arithmetic on lengths, no state."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

SAMPLED_STEPS = 32  # of the first epoch, for an estimate

# Positions within the step's batch; an empty micro-batch keeps ranks in step.
MicroBatch = list[int]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of optimizer steps in one epoch; a last, partial batch is one more step."""
    return math.ceil(examples / batch_size)


def batch_indices(step: int, examples: int, batch_size: int, seed: int, order: str = "shuffle") -> np.ndarray:
    """Return the example numbers of optimizer step `step` (from 0), int64 of shape (at most batch_size,).

    The result depends only on the arguments, not on ranks, packing or interruptions.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(examples, batch_size))
    start = step_in_epoch * batch_size
    return epoch_order(examples, seed, epoch, order)[start : start + batch_size]


def largest_batch(lengths: np.ndarray, batch_size: int, steps: int, seed: int, order: str, enough: int) -> int:
    """Return the most tokens of a batch of `steps` steps. Epochs are looked at until one has a batch of `enough`."""
    starts = np.arange(0, len(lengths), batch_size)
    most = 0
    for epoch in range(math.ceil(steps / len(starts))):
        batches = np.add.reduceat(lengths[epoch_order(len(lengths), seed, epoch, order)], starts)
        most = max(most, int(batches[: steps - epoch * len(starts)].max()))
        if most >= enough:
            break
    return most


@lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int, order: str = "shuffle") -> np.ndarray:
    """Return a permutation of all examples, int64, that depends only on (seed, epoch); 0, 1, 2, ... for "file".

    The array is cached and read-only.
    """
    is_shuffled = order == "shuffle"
    numbers = np.random.default_rng([seed, epoch]).permutation(examples) if is_shuffled else np.arange(examples)
    numbers.flags.writeable = False
    return numbers


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
        if rest:
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


@dataclass(frozen=True)
class BatchPlan:
    """A BatchPlan says how the examples of one batch are shared among ranks.

    `micro_batches(rank)` makes those of a rank, so that each of a thousand ranks makes its own only. `loads` are the
    tokens that each rank computes, with padding, int64 of shape (ranks,).
    """

    micro_batches: Callable[[int], list[MicroBatch]]
    loads: np.ndarray

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return map(self.micro_batches, range(len(self.loads)))


def plan_micro_batches(lengths: np.ndarray, ranks: int, budget: int, packs_documents: bool = True) -> BatchPlan:
    """Share one batch among ranks and pack each share into micro-batches.

        lengths 700 300 600 400, 2 ranks, budget 1000  ->  rank 0: [[0, 1]]   rank 1: [[2, 3]]

    Ranks are balanced in tokens (longest first, to the least loaded rank); no micro-batch holds more than `budget`
    tokens, and without `packs_documents` none more than one example; all ranks have the same number of micro-batches,
    some of them empty where examples are too few.

    Raises ValueError where one example alone is longer than the budget.
    """
    if len(lengths) and lengths.max() > budget:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit a micro-batch of {budget}")
    shares = _share(lengths, ranks)
    bins = _pack(shares, lengths, budget) if packs_documents else shares.places
    count = max(1, int(bins.max(initial=0)) + 1)

    def micro_batches(rank: int) -> list[MicroBatch]:
        span = shares.span(rank)
        filled: list[MicroBatch] = [[] for _ in range(int(bins[span].max(initial=-1)) + 1)]
        for index, number in zip(shares.indices[span].tolist(), bins[span].tolist(), strict=True):
            filled[number].append(index)
        return _split_until(filled, count, lengths)

    return BatchPlan(micro_batches, shares.loads)


def plan_padded(sources: np.ndarray, targets: np.ndarray, ranks: int, budget: int) -> BatchPlan:
    """Share one batch of sources and targets, by their lengths, among ranks, and group each share into micro-batches.

    Ranks are balanced in tokens, and have equal numbers of micro-batches, as in plan_micro_batches. Padding counts: no
    micro-batch has more than `budget` = rows x (longest source + longest target) tokens, and its rows are of about the
    same length.

    Raises ValueError where one example alone is longer than the budget.
    """
    lengths = sources + targets
    if len(lengths) and lengths.max() > budget:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit a micro-batch of {budget}")
    shares = _share(lengths, ranks)
    rows_of = sources.tolist(), targets.tolist()
    grouped = [_group(shares.indices[shares.span(rank)].tolist(), *rows_of, budget) for rank in range(ranks)]
    count = max(1, max(map(len, grouped)))
    batches = [_split_until(groups, count, lengths) for groups in grouped]
    loads = [sum(_padded(rows, *rows_of) for rows in groups) for groups in batches]
    return BatchPlan(batches.__getitem__, np.array(loads))


def _group(share: list[int], sources: Sequence[int], targets: Sequence[int], budget: int) -> list[MicroBatch]:
    groups: list[MicroBatch] = []
    for index in sorted(share, key=lambda index: (targets[index], sources[index], index), reverse=True):
        if groups and _padded(rows := [*groups[-1], index], sources, targets) <= budget:
            groups[-1] = rows
        else:
            groups.append([index])
    return groups


def _padded(rows: MicroBatch, sources: Sequence[int], targets: Sequence[int]) -> int:
    longest = (max((lengths[row] for row in rows), default=0) for lengths in (sources, targets))
    return len(rows) * sum(longest)


def highest_efficiency(lengths: np.ndarray, batch_size: int, ranks: int) -> float:
    """Return the fraction of the ranks' time that tokens can fill, the mean over batches of examples in this order.

    No plan is better: a step takes as long as its longest example, and as an equal share of its tokens.
    """
    steps = min(SAMPLED_STEPS, max(1, len(lengths) // batch_size))
    batches = lengths[: steps * batch_size].reshape(steps, -1)
    tokens = batches.sum(axis=1)
    return float((tokens / np.maximum(tokens, ranks * batches.max(axis=1))).mean())


def efficient_batch_size(lengths: np.ndarray, batch_size: int, ranks: int, wanted: float) -> int | None:
    """Return the first of 1, 2, 4, ... times `batch_size` whose highest_efficiency is at least the `wanted` one.

    None where no batch of so few examples has it.
    """
    while batch_size <= len(lengths):
        if highest_efficiency(lengths, batch_size, ranks) >= wanted:
            return batch_size
        batch_size *= 2
    return None


@dataclass(frozen=True)
class _Shares:
    """The examples of each rank, one rank after the other, longest first.

    `indices` has shape (examples,), `offsets` (ranks + 1,); `loads`, the tokens, has shape (ranks,).
    """

    indices: np.ndarray
    offsets: np.ndarray
    loads: np.ndarray

    def span(self, rank: int) -> slice:
        return slice(self.offsets[rank], self.offsets[rank + 1])

    @property
    def places(self) -> np.ndarray:
        """The place of each example in its share, from 0, (examples,)."""
        return np.arange(len(self.indices)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))


def _share(lengths: np.ndarray, ranks: int) -> _Shares:
    """Balance ranks in tokens: longest first, to the least loaded rank, the lowest of equals.

    Several examples at a time: to the ranks from the least loaded one on, as long as none that has got one is again
    less loaded than the next. That is about one for each rank.
    """
    order = np.argsort(-lengths, kind="stable")  # equals keep their order
    sizes = lengths[order] * ranks
    rank_of = np.empty(len(order), dtype=np.int64)
    keys = np.arange(ranks)  # load x ranks + rank: sorted by load, and by rank where loads are equal
    done = 0
    while done < len(order):
        keys.sort()
        new = keys[: len(order) - done] + sizes[done : done + ranks]
        is_overtaken = np.minimum.accumulate(new)[:-1] < keys[1 : len(new)]
        count = 1 + int(is_overtaken.argmax()) if is_overtaken.any() else len(new)
        rank_of[done : done + count] = keys[:count] % ranks
        keys[:count] = new[:count]
        done += count
    offsets = np.append(0, np.cumsum(np.bincount(rank_of, minlength=ranks)))
    loads = np.empty(ranks, dtype=np.int64)
    loads[keys % ranks] = keys // ranks
    return _Shares(order[np.argsort(rank_of, kind="stable")], offsets, loads)


def _pack(shares: _Shares, lengths: np.ndarray, budget: int) -> np.ndarray:
    """Return the micro-batch of each example: best-fit decreasing, each goes where it leaves least room.

    All ranks at a time: first the longest example of each, then the second ones, and so on. A micro-batch that does not
    exist yet has room for the full budget.
    """
    sizes = lengths[shares.indices]
    starts, counts = shares.offsets[:-1], np.diff(shares.offsets)
    rooms = np.full((len(counts), 1), budget)
    bins = np.empty(len(sizes), dtype=np.int64)
    for place in range(int(counts.max(initial=0))):
        if (rooms[:, -1] < budget).any():
            rooms = np.hstack([rooms, np.full((len(counts), 1), budget)])
        ranks = np.flatnonzero(counts > place)
        examples = starts[ranks] + place
        room, size = rooms[ranks], sizes[examples]
        bins[examples] = chosen = np.where(room >= size[:, None], room, budget + 1).argmin(axis=1)
        rooms[ranks, chosen] -= size
    return bins


def _split_until(bins: list[MicroBatch], count: int, lengths: np.ndarray) -> list[MicroBatch]:
    """Halve the fullest micro-batch until there are `count`; what cannot be halved is filled up with empty ones."""
    if len(bins) == count:
        return bins
    bins = list(bins)
    fullest: list[tuple[int, int]] = []  # a heap of (minus tokens, bin): the fullest first, of those with two or more

    def offer(number: int) -> None:
        if len(bins[number]) > 1:
            heappush(fullest, (-int(lengths[bins[number]].sum()), number))

    for number in range(len(bins)):
        offer(number)
    while fullest and len(bins) < count:
        _, number = heappop(fullest)
        bins[number], half = bins[number][0::2], bins[number][1::2]
        bins.append(half)
        offer(number)
        offer(len(bins) - 1)
    return bins + [[] for _ in range(count - len(bins))]
