"""The numbers of a run at a glance: loss, scores before and after, speed, memory. Pages, JSON and tables show them."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from sft_recipe.config.trainer import GENERATION_METRICS, VALIDATION_METRICS
from sft_recipe.report.curves import ends, ends_size
from sft_recipe.report.run import Run, Series, finite_number
from sft_recipe.tracking.run_facts import PEAK_MEMORY, PREDICTED_MEMORY, STOPPED_EARLY, read_facts

STARTING_FACTS = {
    "device": str,
    "parameters": int,
    "trainable": int,
    STOPPED_EARLY: str,
}
PREDICTIONS = (PREDICTED_MEMORY, "device_memory_gb")
LOWER_IS_BETTER = ("loss", "perplexity", "truncated", "empty")
ORDER = (*VALIDATION_METRICS, *GENERATION_METRICS)
COUNTS = ("tokens", "samples")  # of an evaluation; they measure nothing


@dataclass(frozen=True)
class Score:
    """A metric of the evaluations: at the first one, which is before training at step 0, at the last, and the best."""

    key: str
    series: Series

    @property
    def first(self) -> float:
        """Return the value of the first evaluation."""
        return self.series.values[0]

    @property
    def last(self) -> float:
        """Return the value of the newest evaluation."""
        return self.series.values[-1]

    @property
    def is_lower_better(self) -> bool:
        """Return whether a lower value is better."""
        return self.key.rpartition("/")[2] in LOWER_IS_BETTER

    @property
    def best(self) -> tuple[int, float]:
        """Return step and value of the best evaluation."""
        choose = min if self.is_lower_better else max
        return choose(zip(self.series.steps, self.series.values, strict=True), key=lambda pair: pair[1])


def scores(run: Run) -> list[Score]:
    """Return all metrics of evaluations that have a finite value, `val/...` first."""
    keys = set[str]().union(*run.rows)
    found = [Score(key, series) for key in keys if _is_score(key) and len(series := run.series(key).finite())]
    return sorted(found, key=lambda score: (score.key.startswith("eval/"), score.key.count("/"), _order(score.key)))


def _is_score(key: str) -> bool:
    return key.startswith(("val/", "eval/")) and key.rpartition("/")[2] not in COUNTS


def _order(key: str) -> tuple[str, int]:
    """A named set comes with its metrics in their usual order, then what is unknown here."""
    folder, _, metric = key.rpartition("/")
    return folder, ORDER.index(metric) if metric in ORDER else len(ORDER)


def summary(run: Run) -> dict[str, Any]:
    """Return the facts of a run as plain values that are JSON; what is unknown or not finite is None."""
    losses, facts = run.series("train/loss"), read_facts(run.folder)
    finite = losses.finite().values
    start, end = ends(finite) if finite else (None, None)
    tokens, supervised = _total(run, "train/tokens"), _total(run, "train/supervised_tokens")
    return {
        "model": str(facts.get("model") or run.setting("model.path", run.folder.name)),
        "step": run.last_step,
        "total_steps": run.total_steps,
        "epoch": next((row["epoch"] for row in reversed(run.rows) if "epoch" in row), None),
        "train_loss": {"first": start, "last": end, "mean_of": ends_size(len(finite)) if finite else None},
        "scores": {
            score.key: {"first": score.first, "last": score.last, "best": score.best[1], "best_step": score.best[0]}
            for score in scores(run)
        },
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds": _total(run, "perf/seconds"),
        "tokens_per_s": _median(run, "perf/tokens_per_s"),
        "mfu": _median(run, "perf/mfu"),
        "memory_gb": _peak_memory(run, facts),
        **{key: facts[key] if isinstance(facts.get(key), kind) else None for key, kind in STARTING_FACTS.items()},
        **{key: value if math.isfinite(value := finite_number(facts.get(key))) else None for key in PREDICTIONS},
        "nonfinite_steps": sum(not math.isfinite(value) for value in losses.values),
    }


def _total(run: Run, key: str) -> float | None:
    values = run.series(key).finite().values
    return sum(values) if values else None


def _peak_memory(run: Run, facts: dict[str, Any]) -> float | None:
    """The peak of all steps of rank 0; of the whole run and of all ranks as soon as it has ended."""
    found = [*run.series("perf/memory_gb").values, finite_number(facts.get(PEAK_MEMORY))]
    return max(filter(math.isfinite, found), default=None)


def _median(run: Run, key: str) -> float | None:
    values = run.series(key).finite().values
    return statistics.median(values) if values else None
