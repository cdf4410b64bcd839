"""Validation: loss, perplexity and token accuracy over all supervised tokens, each example counted once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensordict import TensorDict

from sft_recipe.data.token_store import Examples

MICRO_BATCHES_PER_CALL = 16  # on each rank: the engine gets so many at a time


@dataclass(frozen=True)
class ValidationResult:
    """The sums over `tokens` supervised tokens: negative log-likelihoods in nats, and tokens with the largest logit.

    `correct` is None where the engine does not count them.
    """

    nll: float
    tokens: int
    correct: int | None

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return loss, perplexity, accuracy and number of tokens, with names that begin with `prefix`."""
        loss = self.nll / self.tokens
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": self.tokens}
        if self.correct is not None:
            found["token_accuracy"] = self.correct / self.tokens
        return {f"{prefix}{name}": value for name, value in found.items()}


def validation_metrics(results: Mapping[str, ValidationResult]) -> dict[str, float]:
    """Return val/loss and the others over all sets, weighted by tokens, and val/<set>/loss for sets with a name."""
    parts = list(results.values())
    counts = [part.correct for part in parts if part.correct is not None]
    correct = sum(counts) if len(counts) == len(parts) else None
    total = ValidationResult(sum(part.nll for part in parts), sum(part.tokens for part in parts), correct)
    named = {
        key: value for name, part in results.items() if name for key, value in part.metrics(f"val/{name}/").items()
    }
    return total.metrics("val/") | named


def evaluate(
    examples: Examples,
    budget: int,
    ranks: int,
    build_batch: Callable[[Examples, np.ndarray], TensorDict],
    infer: Callable[[TensorDict], dict[str, Any]],
    progress: Callable[[int], None],
) -> ValidationResult:
    """Compute the loss of all examples, in chunks that do not depend on the training batch size; none is dropped.

    `budget` is the number of tokens of a micro-batch. `infer` returns a batch's metrics, with its mean `loss` and
    `correct`, or None for it. `progress` is called before each chunk, with the number of completed examples.
    """
    nll, tokens, correct = 0.0, 0, 0
    counts = True
    for indices in _chunks(examples.lengths, budget * ranks * MICRO_BATCHES_PER_CALL):
        progress(int(indices[0]))
        supervised = int((examples.lengths[indices] - examples.source_lengths[indices]).sum())
        found = infer(build_batch(examples, indices))
        nll += found["loss"] * supervised
        tokens += supervised
        counts = counts and found["correct"] is not None
        correct += found["correct"] or 0
    return ValidationResult(nll, tokens, correct if counts else None)


def _chunks(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Splits the indices into ranges of about `tokens` tokens each."""
    chunk = (np.cumsum(lengths) - 1) // tokens
    return [np.flatnonzero(chunk == number) for number in np.unique(chunk)]
