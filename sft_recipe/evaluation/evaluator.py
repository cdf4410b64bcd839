"""The evaluation of a run: everything that is computed of the model beside its training, and what it is called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tensordict import TensorDict

from sft_recipe.data.token_store import Examples
from sft_recipe.evaluation.generation import AnswerGenerator, GenerationResult
from sft_recipe.evaluation.validation import evaluate, validation_metrics


class BatchSource(Protocol):
    """Builds this rank's part of a batch."""

    def plan_and_build(self, examples: Examples, indices: np.ndarray) -> TensorDict:
        """Return the batch of the examples at `indices`."""


class Model(Protocol):
    """Computes the loss of batches on `data_ranks` ranks together."""

    @property
    def data_ranks(self) -> int:
        """Return the number of shares that a batch is split into."""

    def evaluate(self, batch: TensorDict) -> dict[str, Any]:
        """Return the mean `loss` of a batch, and how many of its tokens were `correct`."""


class Evaluator:
    """Evaluates a model on named sets; one without a name has an empty one. All methods are collective."""

    def __init__(
        self,
        token_budget: int,
        sets: dict[str, Examples],
        batches: BatchSource,
        model: Model,
        answers: AnswerGenerator | None = None,
    ):
        """Micro-batches hold up to `token_budget` tokens; without `answers` nothing is generated."""
        self.token_budget = token_budget
        self.sets = sets
        self.batches = batches
        self.model = model
        self.answers = answers

    def run(self, progress: Callable[[int, int], None]) -> "Evaluation":
        """Return the metrics, none where there is no validation set, and the answers.

        `progress` is called with the number of completed examples and of all; what it raises ends the evaluation.
        """
        results, done = {}, 0
        total = sum(len(examples) for examples in self.sets.values())
        for name, examples in self.sets.items():

            def completed(count: int, before: int = done) -> None:
                progress(before + count, total)

            results[name] = evaluate(
                examples,
                self.token_budget,
                self.model.data_ranks,
                self.batches.plan_and_build,
                self.model.evaluate,
                completed,
            )
            done += len(examples)
        metrics = validation_metrics(results) if results else {}
        generated = self.answers.run() if self.answers else GenerationResult()
        return Evaluation(metrics | generated.metrics(), generated)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, if one took place: metrics by name, and the answers that some of them come from."""

    metrics: dict[str, float] = field(default_factory=dict)
    generated: GenerationResult = field(default_factory=GenerationResult)
