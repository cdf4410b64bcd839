"""Validation: the mean loss over all supervised tokens of the validation examples, each counted once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensordict import TensorDict

from sft_recipe.data.token_store import Examples

MICRO_BATCHES_PER_CALL = 16  # on each rank: the engine gets so many at a time


@dataclass(frozen=True)
class ValidationResult:
    """The mean negative log-likelihood per supervised token is `loss`, in nats; `tokens` counts those tokens."""

    loss: float
    tokens: int


def evaluate(
    examples: Examples,
    budget: int,
    ranks: int,
    build_batch: Callable[[Examples, np.ndarray], TensorDict],
    infer: Callable[[TensorDict], dict[str, Any]],
    progress: Callable[[int, int], None],
) -> ValidationResult:
    """Compute the loss of all examples, in chunks that do not depend on the training batch size; none is dropped.

    `budget` is the number of tokens of a micro-batch. `infer` returns a batch's metrics, with its mean `loss`.
    `progress` is called before each chunk, with the number of completed examples and of all examples.
    """
    total, tokens = 0.0, 0
    for indices in _chunks(examples.lengths, budget * ranks * MICRO_BATCHES_PER_CALL):
        progress(int(indices[0]), len(examples))
        supervised = sum(int(examples[index][1].sum()) for index in indices)
        total += infer(build_batch(examples, indices))["loss"] * supervised
        tokens += supervised
    return ValidationResult(total / tokens, tokens)


def _chunks(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Splits the indices into ranges of about `tokens` tokens each."""
    chunk = (np.cumsum(lengths) - 1) // tokens
    return [np.flatnonzero(chunk == number) for number in np.unique(chunk)]
