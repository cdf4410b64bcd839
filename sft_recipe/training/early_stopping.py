"""Decides after each evaluation whether it is the best so far, and whether the run has seen enough."""

from dataclasses import asdict, dataclass
from typing import Any

from sft_recipe.config.trainer import EarlyStoppingConfig
from sft_recipe.language import plural


@dataclass
class Progress:
    """Progress is what earlier evaluations leave behind; a checkpoint's manifest holds it.

    `best` is the best value, `reference` the last one that was an improvement by `min_delta`, and `waited` the number
    of evaluations since. `last` is the value of the newest evaluation. All are values of `metric`.
    """

    metric: str
    mode: str

    best: float | None = None
    reference: float | None = None
    waited: int = 0
    last: float | None = None


class EarlyStopping:
    """Follows one metric through the evaluations of a run. It is the same on all ranks, and exact on resume."""

    def __init__(self, config: EarlyStoppingConfig, state: dict[str, Any] | None = None):
        """Continue from `state`, which a checkpoint's manifest holds; from the beginning if it is of another metric."""
        self.config = config
        self.progress = Progress(config.metric, config.mode)
        if state and (state["metric"], state["mode"]) == (config.metric, config.mode):
            self.progress = Progress(**state)

    def state(self) -> dict[str, Any]:
        """Return what another EarlyStopping continues from, as JSON can hold it."""
        return asdict(self.progress)

    def update(self, row: dict[str, Any]) -> bool:
        """Take the metrics of an evaluation. Returns whether it is better than all before."""
        value, progress = row[self.config.metric], self.progress
        is_best = self._is_better(value, progress.best)
        progress.last = value
        if is_best:
            progress.best = value
        if self._is_better(value, progress.reference, self.config.min_delta):
            progress.reference, progress.waited = value, 0
        else:
            progress.waited += 1
        return is_best

    def reason(self) -> str | None:
        """Return why the run should stop now, or None."""
        config, progress = self.config, self.progress
        if config.target is not None and progress.last is not None and self._is_better(progress.last, config.target):
            return f"{config.metric} is {progress.last:.4g}, better than the target {config.target:g}"
        if config.patience is not None and progress.waited >= config.patience:
            by = f" by {config.min_delta:g}" if config.min_delta else ""
            evaluations = plural(progress.waited, "evaluation")
            best = "never a number, " if progress.best is None else f"best {progress.best:.4g}, "
            best = "" if progress.best == progress.last else best
            return f"{config.metric} has not improved{by} in {evaluations} ({best}now {progress.last:.4g})"
        return None

    def _is_better(self, value: float, other: float | None, by: float = 0.0) -> bool:
        if value != value:  # NaN
            return False
        if other is None:
            return True
        return value < other - by if self.config.mode == "min" else value > other + by
