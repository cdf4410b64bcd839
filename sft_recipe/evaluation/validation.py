"""Validation: the mean loss over every supervised token of the validation examples, each counted once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tensordict import TensorDict

from sft_recipe.data.token_store import Examples

MICRO_BATCHES_AT_ONCE = 16  # per rank: what is handed to the engine in one go


@dataclass(frozen=True)
class ValidationResult:
    """Mean negative log-likelihood per supervised token, and how many tokens those are."""

    loss: float
    tokens: int


def evaluate(
    examples: Examples,
    budget: int,
    ranks: int,
    make_batch: Callable[[Examples, np.ndarray], TensorDict],
    infer: Callable[[TensorDict], dict],
    progress: Callable[[int, int], None],
) -> ValidationResult:
    """Run all examples, in chunks that do not depend on the batch size; the last one may be small, none is dropped.

    `infer` gives a batch's metrics; `progress` is told how many examples are done, of how many.
    """
    total, tokens = 0.0, 0
    for numbers in _chunks(examples.lengths, budget * ranks * MICRO_BATCHES_AT_ONCE):
        progress(int(numbers[0]), len(examples))
        supervised = sum(int(examples[i][1].sum()) for i in numbers)
        total += infer(make_batch(examples, numbers))["loss"] * supervised
        tokens += supervised
    return ValidationResult(total / tokens, tokens)


def _chunks(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Runs of neighbouring examples of about `tokens` tokens each."""
    which = (np.cumsum(lengths) - 1) // tokens
    return [np.flatnonzero(which == value) for value in np.unique(which)]
