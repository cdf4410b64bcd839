"""Shows how the examples of one optimizer step are packed into micro-batches."""

from collections.abc import Iterator

from sft_recipe.data.batching import batch_indices, steps_per_epoch
from sft_recipe.data.preview.stats import DatasetStats, plan_batch
from sft_recipe.display import printable
from sft_recipe.errors import ConfigError
from sft_recipe.language import plural


def step_lines(stats: DatasetStats, step: int) -> Iterator[str]:
    """Yield lines about a step of the first epoch, from 1: its micro-batches by rank, and the examples in each.

    Raises ConfigError for a step that the epoch does not have.
    """
    settings, (lengths, sources, numbers) = stats.settings, stats.epoch()
    steps = steps_per_epoch(len(lengths), settings.batch_size)
    if step > steps:
        raise ConfigError(f"--step is {step}, but an epoch has {plural(steps, 'step')}")
    chosen = batch_indices(step - 1, len(lengths), settings.batch_size, settings.seed, settings.order)
    batch = lengths[chosen].tolist()
    plan = list(plan_batch(lengths[chosen], sources[chosen], settings))
    count, size = sum(map(len, plan)), plural(len(batch), "example")
    yield f"step {step} of {steps:,}: {size}, {sum(batch):,} tokens in {plural(count, 'micro-batch')}"
    for rank, micro_batches in enumerate(plan):
        for number, micro_batch in enumerate(micro_batches, 1):
            tokens = sum(batch[index] for index in micro_batch)
            yield f"  rank {rank}, micro-batch {number}: {tokens:,} of at most {settings.token_budget:,} tokens"
            for index in micro_batch:
                source = printable(stats.source_of(int(numbers[chosen[index]])))
                yield f"    {plural(batch[index], 'token')}: {source}"
