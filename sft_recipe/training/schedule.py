"""Steps of a run, counted from 1: how many there are, and after which of them something is due."""

from dataclasses import dataclass

from sft_recipe.config.schema import Config
from sft_recipe.config.values import AFTER_EACH_EPOCH, StepInterval
from sft_recipe.data.batching import largest_batch, steps_per_epoch
from sft_recipe.data.token_store import Examples
from sft_recipe.models.workload import Workload, data_ranks


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
        steps = self.interval_steps(interval)
        return self.is_last(step) or (steps > 0 and step % steps == 0)

    def is_due_before_end(self, interval: StepInterval) -> bool:
        """Return whether something that happens at this interval happens before the last step."""
        return 0 < self.interval_steps(interval) < self.total_steps

    def interval_steps(self, interval: StepInterval) -> int:
        """Return the steps of an interval; 0 or less means: after the last step only."""
        return self.steps_per_epoch if interval == AFTER_EACH_EPOCH else int(interval)


def may_save_best(config: Config) -> bool:
    """Return whether a run saves the checkpoints that its evaluations find best."""
    return config.trainer.save_best and bool(config.data.val_files or config.data.val_ratio)


def workload_of(config: Config, train: Examples) -> Workload:
    """Return what the memory of a run on these examples depends on; with padding each counts as the longest one."""
    data, trainer = config.data, config.trainer
    schedule, longest = Schedule.from_config(config, len(train)), int(train.lengths.max())
    enough = data_ranks(config) * data.token_budget + 1  # larger batches need several micro-batches, and no more memory
    steps, size = schedule.total_steps, data.train_batch_size
    most = largest_batch(train.lengths, size, steps, trainer.seed, data.order, enough)
    saves = may_save_best(config) or schedule.is_due_before_end(trainer.save_freq)
    return Workload(longest, longest if data.has_targets else most / size, saves)
