"""What the memory of a run depends on beside its configuration: how long its examples are, and when it saves."""

import math
from dataclasses import dataclass, replace

from sft_recipe.config.schema import Config


def data_ranks(config: Config) -> int:
    """Return among how many ranks a batch is divided; those that share sequences count as one."""
    return config.trainer.world_size // config.fsdp.ulysses_sequence_parallel_size


@dataclass(frozen=True)
class Workload:
    """The tokens of the `longest` example, and of the `mean` one of the batch with most tokens.

    Without `saves_before_end` the run saves after its last step only, when the activations are gone.
    """

    longest: int
    mean: float
    saves_before_end: bool = True

    def limited(self, tokens: int) -> "Workload":
        """Return the workload where no example has more than so many tokens."""
        return replace(self, longest=min(self.longest, tokens), mean=min(self.mean, tokens))

    def micro_batch(self, batch_size: int, ranks: int, budget: int) -> int:
        """Return a bound on the tokens of a micro-batch: all that a rank has of the largest batch, within the budget.

        The rank with most tokens got its last example when it had at most an equal share of the others (Graham 1969,
        https://doi.org/10.1137/0117039).
        """
        share = (batch_size * self.mean + (ranks - 1) * self.longest) / ranks
        return min(budget, math.ceil(share))
