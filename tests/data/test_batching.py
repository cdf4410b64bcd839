"""Planning over random lengths, ranks and budgets: who trains what, when, and in which micro-batch."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sft_recipe.data.batching import (
    batch_indices,
    epoch_order,
    highest_efficiency,
    largest_batch,
    plan_micro_batches,
    plan_padded,
    sample_mixture,
    split_validation,
    steps_per_epoch,
)
from sft_recipe.data.notices import idle_notice
from sft_recipe.models.workload import Workload

SIZES = st.integers(1, 60)
BATCHES = st.integers(1, 24)
SEEDS = st.integers(0, 2**63)
EPOCHS = st.integers(0, 50)


@st.composite
def batches(draw):
    """Lengths of one batch, ranks, and a budget that the longest example fits."""
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=40))
    budget = max(lengths) + draw(st.integers(0, 400))
    return lengths, draw(st.integers(1, 12)), budget


def planned(lengths, ranks, budget):
    return list(plan_micro_batches(np.asarray(lengths, dtype=np.int64), ranks, budget))


def planned_padded(sources, targets, ranks, budget):
    return list(plan_padded(np.array(sources), np.array(targets), ranks, budget))


def epoch_steps(examples: int, batch_size: int, seed: int, epoch: int, order: str = "shuffle") -> list[list[int]]:
    count = steps_per_epoch(examples, batch_size)
    steps = range(epoch * count, (epoch + 1) * count)
    return [batch_indices(step, examples, batch_size, seed, order).tolist() for step in steps]


# Order


@given(SIZES, BATCHES, SEEDS, EPOCHS, st.sampled_from(["shuffle", "file"]))
@example(examples=10, batch_size=4, seed=0, epoch=1, order="shuffle")
def test_an_epoch_trains_every_example_once_and_the_last_partial_batch_too(examples, batch_size, seed, epoch, order):
    steps = epoch_steps(examples, batch_size, seed, epoch, order)
    assert sorted(sum(steps, [])) == list(range(examples))
    assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert len(steps[-1]) == examples - batch_size * (len(steps) - 1) > 0


@pytest.mark.parametrize(("examples", "batch_size", "steps"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 1, 9)])
def test_steps_per_epoch_counts_the_partial_batch(examples, batch_size, steps):
    assert steps_per_epoch(examples, batch_size) == steps


@given(SIZES, BATCHES, SEEDS, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_step_is_the_same_whatever_was_asked_before(examples, batch_size, seed, steps):
    """A run that resumes asks for step k first; one that never stopped asks for it after all others."""
    first = {step: batch_indices(step, examples, batch_size, seed).tolist() for step in steps}
    np.random.seed(0)  # someone else's global state
    again = {step: batch_indices(step, examples, batch_size, seed).tolist() for step in reversed(range(61))}
    assert first == {step: again[step] for step in steps}


@given(SEEDS, EPOCHS, st.integers(20, 60))
def test_epochs_and_seeds_have_orders_of_their_own(seed, epoch, examples):
    order = epoch_order(examples, seed, epoch).tolist()
    assert order == epoch_order(examples, seed, epoch).tolist()
    assert order != epoch_order(examples, seed, epoch + 1).tolist()
    assert order != epoch_order(examples, seed + 1, epoch).tolist()
    assert order != list(range(examples))


def test_the_order_is_the_one_that_checkpoints_were_written_with():
    """A run that another version of the code began goes on with the examples that it has not seen."""
    assert epoch_order(8, seed=42, epoch=0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
    assert epoch_order(8, seed=42, epoch=1).tolist() == [0, 4, 6, 1, 2, 7, 3, 5]


def test_without_shuffling_the_order_is_that_of_the_file():
    assert epoch_steps(5, 2, seed=1, epoch=3, order="file") == [[0, 1], [2, 3], [4]]


@given(SIZES, BATCHES, SEEDS, EPOCHS, st.integers(1, 10))
def test_a_step_trains_the_same_examples_on_any_number_of_ranks(examples, batch_size, seed, epoch, ranks):
    lengths = np.random.default_rng(seed).integers(1, 100, examples)
    for numbers in epoch_steps(examples, batch_size, seed, epoch):
        plan = planned(lengths[numbers], ranks, budget=200)
        assert sorted(numbers[position] for position in members(plan)) == sorted(numbers)


# Micro-batches


def members(plan) -> list[int]:
    return [position for rank in plan for micro_batch in rank for position in micro_batch]


def load(micro_batches, lengths) -> int:
    return sum(lengths[position] for micro_batch in micro_batches for position in micro_batch)


@given(batches())
def test_the_ranks_together_train_the_batch_once(batch):
    lengths, ranks, budget = batch
    plan = planned(lengths, ranks, budget)
    assert len(plan) == ranks
    assert sorted(members(plan)) == list(range(len(lengths)))


@given(batches())
def test_no_micro_batch_is_over_budget(batch):
    lengths, ranks, budget = batch
    plan = planned(lengths, ranks, budget)
    assert all(load([micro_batch], lengths) <= budget for rank in plan for micro_batch in rank)


@given(batches())
def test_all_ranks_run_the_same_number_of_micro_batches(batch):
    lengths, ranks, budget = batch
    counts = {len(rank) for rank in planned(lengths, ranks, budget)}
    assert len(counts) == 1 and counts != {0}


@given(batches())
@example(batch=([200, 1, 1, 1, 1], 2, 200))
def test_ranks_are_balanced_in_tokens(batch):
    lengths, ranks, budget = batch
    loads = [load(rank, lengths) for rank in planned(lengths, ranks, budget)]
    assert max(loads) - min(loads) <= max(lengths)


@given(batches())
@example(batch=([10, 9, 8, 7, 6, 5], 1, 45))
def test_examples_are_packed(batch):
    """First fit leaves at most one bin half empty, so that the number of bins is below twice the least possible."""
    lengths, ranks, budget = batch
    plan = planned(lengths, ranks, budget)
    fullest = max(load(rank, lengths) for rank in plan)
    assert len(plan[0]) <= max(1, math.ceil(2 * fullest / budget))


@given(batches())
@example(batch=([9, 9, 9, 3, 3, 3, 3, 3, 3, 3, 3, 3], 2, 10))
def test_a_micro_batch_is_empty_only_where_its_rank_has_too_few_examples(batch):
    for rank in planned(*batch):
        assert all(rank) or all(len(micro_batch) <= 1 for micro_batch in rank)


def test_the_docstrings_example():
    assert planned([700, 300, 600, 400], ranks=2, budget=1000) == [[[0, 1]], [[2, 3]]]


def test_with_more_ranks_than_examples_the_others_have_an_empty_micro_batch():
    assert planned([5, 7], ranks=4, budget=10) == [[[1]], [[0]], [[]], [[]]]


def test_a_rank_with_room_splits_its_micro_batches_to_keep_step_with_the_others():
    """Rank 0 has 8 + 3 tokens and needs two micro-batches; rank 1 has 6 + 4, which would fit in one."""
    assert planned([8, 6, 4, 3], ranks=2, budget=10) == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize(("lengths", "ranks"), [([11], 1), ([3, 11, 2], 2), ([11, 11], 8)])
def test_an_example_longer_than_the_budget_is_refused(lengths, ranks):
    with pytest.raises(ValueError, match="example of 11 tokens .* micro-batch of 10"):
        planned(lengths, ranks, budget=10)


def test_an_example_as_long_as_the_budget_is_not():
    assert planned([10, 10], ranks=1, budget=10) == [[[0], [1]]]


@pytest.mark.parametrize(("ranks", "longest"), [(64, 2048), (64, 16384), (1, 16384)])
def test_a_large_batch_is_planned(ranks, longest):
    """It is quick unless someone makes it quadratic: then the suite becomes noticeably slow here."""
    lengths = np.random.default_rng(0).integers(1, longest, 4096, endpoint=True).tolist()
    assert sorted(members(planned(lengths, ranks, budget=16384))) == list(range(4096))


def plain_plan(lengths, ranks, budget):
    """The same plan as a person would make it, by looking through everything at every turn."""
    shares = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        min(shares, key=lambda share: sum(lengths[i] for i in share)).append(index)
    packed = []
    for share in shares:
        packed.append(bins := [])
        for index in share:
            fitting = [members for members in bins if load([members], lengths) + lengths[index] <= budget]
            if not fitting:
                bins.append([index])
            else:
                max(fitting, key=lambda members: load([members], lengths)).append(index)
    count = max(1, *map(len, packed))
    for bins in packed:
        while len(bins) < count:
            divisible = [number for number, members in enumerate(bins) if len(members) > 1]
            if not divisible:
                bins.append([])
                continue
            fullest = max(divisible, key=lambda number: load([bins[number]], lengths))
            bins[fullest], other_half = bins[fullest][::2], bins[fullest][1::2]
            bins.append(other_half)
    return packed


@given(batches())
@example(batch=([5, 5, 5, 5, 5, 5, 5], 3, 10))
@example(batch=([9, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2, 9))
@example(batch=([200, 200, 200, 1, 1, 1, 1, 1, 1, 1, 1, 1], 4, 200))
def test_a_plan_is_the_one_that_a_plain_search_finds(batch):
    assert planned(*batch) == plain_plan(*batch)


def fewest_bins(lengths, budget) -> int:
    """By trying every way to fill bins."""

    def search(rest, rooms):
        if not rest:
            return len(rooms)
        places = [number for number, room in enumerate(rooms) if room >= rest[0]]
        found = [search(rest[1:], [room - rest[0] * (n == p) for n, room in enumerate(rooms)]) for p in places]
        return min([*found, search(rest[1:], [*rooms, budget - rest[0]])])

    return search(lengths, [])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 20))
def test_micro_batches_are_nearly_as_few_as_they_can_be(lengths, spare):
    """Longest first needs at most 11/9 of the least possible number, and 6/9 more."""
    budget = max(lengths) + spare
    assert 9 * len(planned(lengths, 1, budget)[0]) <= 11 * fewest_bins(lengths, budget) + 6


def lengths_like_real_ones(examples: int) -> list[int]:
    """Skewed as conversations are: half are below 220 tokens, one in a hundred is above 900."""
    return np.random.default_rng(0).lognormal(5.4, 0.6, examples).clip(16, 2048).astype(int).tolist()


def largest_over_mean(shares, lengths) -> float:
    loads = [load(share, lengths) for share in shares]
    return max(loads) * len(loads) / sum(loads)


@pytest.mark.parametrize(("ranks", "examples"), [(8, 256), (64, 1024), (1024, 16384)])
def test_no_rank_has_much_more_to_do_than_the_mean(ranks, examples):
    lengths = lengths_like_real_ones(examples)
    random_shares = np.random.default_rng(0).permutation(examples).reshape(ranks, 1, -1).tolist()
    assert largest_over_mean(random_shares, lengths) > 1.15
    assert largest_over_mean(planned(lengths, ranks, budget=16384), lengths) <= 1.03


# What the memory of a run depends on


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40), BATCHES, st.integers(1, 30), st.booleans(), SEEDS,
    st.integers(1, 800),
)  # fmt: skip
def test_the_batch_with_most_tokens_is_found(lengths, batch_size, steps, shuffles, seed, enough):
    sizes, order = np.array(lengths), "shuffle" if shuffles else "file"
    batches = [sizes[batch_indices(step, len(sizes), batch_size, seed, order)].sum() for step in range(steps)]
    assert largest_batch(sizes, batch_size, steps, seed, order, enough=10**9) == max(batches)
    found = largest_batch(sizes, batch_size, steps, seed, order, enough)  # later epochs need not be looked at
    assert found == max(batches) or enough <= found < max(batches)


@given(batches())
def test_no_micro_batch_has_more_tokens_than_memory_is_estimated_for(batch):
    lengths, ranks, budget = batch
    largest = max(load([micro_batch], lengths) for rank in planned(lengths, ranks, budget) for micro_batch in rank)
    workload = Workload(max(lengths), sum(lengths) / len(lengths))
    assert largest <= workload.micro_batch(len(lengths), ranks, budget) <= budget


# Ranks that wait for the longest example


@given(batches())
def test_no_plan_is_more_efficient_than_the_highest_efficiency(batch):
    lengths, ranks, budget = batch
    plan = plan_micro_batches(np.array(lengths), ranks, budget)
    assert plan.loads.tolist() == [load(rank, lengths) for rank in plan]
    efficiency = sum(lengths) / ranks / max(plan.loads)
    assert efficiency <= highest_efficiency(np.array(lengths), len(lengths), ranks) + 1e-9


# Each eight examples have 1000 + 7 x 100 tokens; the longest of a batch takes as long as 8 ranks x 1000 tokens.
LENGTHS = np.tile([100] * 7 + [1000], 32)


@pytest.mark.parametrize(("batch_size", "efficiency"), [(16, 0.425), (32, 0.85), (64, 1), (256, 1)])
def test_highest_efficiency_is_the_mean_over_batches(batch_size, efficiency):
    assert highest_efficiency(LENGTHS, batch_size, ranks=8) == pytest.approx(efficiency)
    mixed = np.concatenate([LENGTHS[:16], [100] * 16])  # the second batch of 16 has 2 x 100 tokens for each rank
    assert highest_efficiency(mixed, 16, ranks=8) == pytest.approx((0.425 + 1) / 2)


def test_the_notice_names_the_batch_size_that_keeps_ranks_busy():
    assert idle_notice(LENGTHS, 16, 8) == (
        "BATCH_SIZE 16 (data.train_batch_size) keeps 8 ranks busy for at most 42% of their time, since all wait for "
        "the rank with the longest example. BATCH_SIZE 64 allows 100%."
    )
    assert idle_notice(LENGTHS, 32, 8) is idle_notice(LENGTHS, 16, 1) is None
    assert "Use fewer ranks or lower MAX_LENGTH" in idle_notice(LENGTHS[:48], 16, 8)


# ValidationResult split


@given(st.integers(2, 500), st.floats(0.001, 0.999), SEEDS)
@example(examples=2, ratio=0.001, seed=0)
@example(examples=2, ratio=0.999, seed=0)
def test_a_split_is_disjoint_complete_in_file_order_and_about_the_ratio(examples, ratio, seed):
    train, validation = (part.tolist() for part in split_validation(np.arange(examples), ratio, seed))
    assert train == sorted(train) and validation == sorted(validation)
    assert sorted(train + validation) == list(range(examples))
    assert train and validation
    assert abs(len(validation) - examples * ratio) <= 1


def test_a_split_is_seeded():
    def held_out(seed):
        return split_validation(np.arange(1000), 0.1, seed)[1].tolist()

    assert held_out(42) == held_out(42) != held_out(43)
    assert held_out(42) != list(range(100)) and held_out(42) != list(range(900, 1000))


def test_a_split_is_not_the_beginning_of_an_epochs_order():
    """What is held out must not hang together with what the first steps would have trained."""
    held_out = set(split_validation(np.arange(1000), 0.1, seed=42)[1].tolist())
    assert all(held_out != set(epoch_order(1000, 42, epoch)[:100].tolist()) for epoch in range(20))


@given(st.lists(st.integers(0, 9), min_size=2, max_size=200), st.floats(0.01, 0.99), SEEDS)
def test_equal_examples_are_on_the_same_side_of_a_split(digests, ratio, seed):
    train, validation = split_validation(np.asarray(digests), ratio, seed)
    assert sorted([*train, *validation]) == list(range(len(digests)))
    sides = {digests[place] for place in train}, {digests[place] for place in validation}
    assert not sides[0] & sides[1]
    assert all(sides) or len(set(digests)) == 1


# Mixtures


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200)), min_size=1, max_size=4), SEEDS)
def test_a_mixture_has_of_each_source_what_is_wanted_as_evenly_as_it_goes(shares, seed):
    numbers = sample_mixture(shares, seed)
    assert numbers.tolist() == sorted(numbers.tolist()) == sample_mixture(shares, seed).tolist()
    begin = 0
    for examples, target_count in shares:
        counts = np.bincount(numbers, minlength=begin + examples)[begin : begin + examples]
        assert counts.sum() == target_count
        assert counts.max() - counts.min() <= 1
        begin += examples
    assert numbers.max() < begin


def test_a_mixture_is_seeded_and_no_two_sources_draw_the_same_lot():
    first, second = sample_mixture([(1000, 100), (1000, 100)], 42).reshape(2, 100)
    assert first.tolist() != (second - 1000).tolist()
    assert sample_mixture([(1000, 100)], 42).tolist() == first.tolist() != sample_mixture([(1000, 100)], 43).tolist()
    assert sample_mixture([(5, 5), (3, 3)], 42).tolist() == list(range(8))


@st.composite
def pairs(draw):
    """Lengths of sources and targets, a number of ranks, and a budget that each example fits."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40))
    budget = draw(st.integers(max(map(sum, lengths)), 400))
    return [source for source, _ in lengths], [target for _, target in lengths], draw(st.integers(1, 5)), budget


@given(pairs())
def test_padded_micro_batches_hold_each_example_once_within_the_budget(batch):
    sources, targets, ranks, budget = batch
    plan = planned_padded(sources, targets, ranks, budget)
    assert sorted(members(plan)) == list(range(len(sources)))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    for rows in (micro_batch for rank in plan for micro_batch in rank if micro_batch):
        assert len(rows) * (max(sources[row] for row in rows) + max(targets[row] for row in rows)) <= budget


def test_rows_of_about_the_same_length_share_a_micro_batch():
    assert planned_padded([9, 2, 9, 2], [9, 2, 9, 2], 1, 36) == [[[2, 0], [3, 1]]]
