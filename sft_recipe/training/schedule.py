"""Steps of a run, counted from 1: how many there are, and after which of them something is due."""

from dataclasses import dataclass

from sft_recipe.config.schema import Config
from sft_recipe.config.values import AFTER_EACH_EPOCH, StepInterval
from sft_recipe.data.batching import ExampleLengths, example_lengths, steps_per_epoch
from sft_recipe.data.token_store import Examples


@dataclass(frozen=True)
class Schedule:
    """Numbers of optimizer steps: of one epoch, and of the run with all its epochs."""

    steps_per_epoch: int
    total_steps: int

    @classmethod
    def from_config(cls, config: Config, examples: int) -> "Schedule":
        """Return the schedule of a run on this many training examples."""
        steps = steps_per_epoch(examples, config.data.train_batch_size)
        return cls(steps, config.trainer.total_training_steps or config.trainer.total_epochs * steps)

    def epoch(self, step: int) -> float:
        """Return the number of epochs that are complete after `step`, with its fraction."""
        return step / self.steps_per_epoch

    def is_last(self, step: int) -> bool:
        """Return whether the run ends after `step`."""
        return step == self.total_steps

    def ends_epoch(self, step: int) -> bool:
        """Return whether an epoch is complete after `step`."""
        return step > 0 and step % self.steps_per_epoch == 0

    def is_evaluation_due(self, interval: StepInterval, step: int) -> bool:
        """Return whether the model is evaluated after `step`: at this interval, before training, and after epochs.

        An interval of 0 or less means: after the last step only.
        """
        is_only_at_end = interval != AFTER_EACH_EPOCH and int(interval) <= 0
        return self.is_due(interval, step) or (not is_only_at_end and (step == 0 or self.ends_epoch(step)))

    def is_due(self, interval: StepInterval, step: int) -> bool:
        """Return whether something that happens at this interval, and after the last step, happens after `step`.

        An interval of 0 or less means: after the last step only.
        """
        steps = self.steps_per_epoch if interval == AFTER_EACH_EPOCH else int(interval)
        return self.is_last(step) or (steps > 0 and step % steps == 0)


def run_lengths(config: Config, train: Examples) -> ExampleLengths:
    """Return the lengths of a run's examples and batches; with padding each example counts as the longest one."""
    data, trainer = config.data, config.trainer
    steps = Schedule.from_config(config, len(train)).total_steps
    ranks = trainer.world_size // config.fsdp.ulysses_sequence_parallel_size
    enough = ranks * data.token_budget + 1  # larger batches need several micro-batches, and no more memory
    found = example_lengths(train.lengths, data.train_batch_size, steps, trainer.seed, data.order, enough)
    return found._replace(mean=found.longest) if data.has_targets else found
