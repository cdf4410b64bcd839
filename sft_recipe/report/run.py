"""A run as its folder records it: the rows of metrics.jsonl, configuration, data statistics and generated answers."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_recipe import FORMAT_VERSION
from sft_recipe.config.run_config import read_run_config
from sft_recipe.data.statistics import FILE as DATA
from sft_recipe.errors import CheckpointError
from sft_recipe.files import user_path
from sft_recipe.tracking.metrics_file import FILE, SAMPLES

TINY, HUGE = 1e-100, 1e100  # no metric and no setting is outside, but for 0
GENERAL = "general"  # the validation set with data/general.jsonl, which shows what a model forgets


@dataclass(frozen=True)
class Series:
    """One metric over the steps that have it; a value that was not finite is NaN."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Series":
        """Return the series without the values that are not finite."""
        if all(map(math.isfinite, self.values)):
            return self
        kept = [pair for pair in zip(self.steps, self.values, strict=True) if math.isfinite(pair[1])]
        return Series([step for step, _ in kept], [value for _, value in kept])


@dataclass(frozen=True)
class Run:
    """A run: `rows` in the order of the steps, `config` as nested plain values, `samples` by evaluation.

    `data` has the statistics of the training data, empty for runs of older versions.
    """

    folder: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    samples: list[dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    _series: dict[str, Series] = field(default_factory=dict, init=False, repr=False, compare=False)  # made before

    def series(self, key: str) -> Series:
        """Return the values of a metric, empty where no row has it."""
        if key not in self._series:
            rows = [row for row in self.rows if key in row]
            self._series[key] = Series([row["step"] for row in rows], [finite_number(row[key]) for row in rows])
        return self._series[key]

    def setting(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the configuration such as optim.lr; `default` where it is absent.

        A value of another kind than the default, as in a configuration that was edited, counts as absent.
        """
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        kind = int | float if isinstance(default, int | float) else object if default is None else type(default)
        is_number = isinstance(value, int | float)
        is_used = value is not None and isinstance(value, kind) and not (is_number and math.isnan(finite_number(value)))
        return value if is_used else default

    @property
    def losses(self) -> Series:
        """Return the finite training losses."""
        return self.series("train/loss").finite()

    @property
    def peak_rate(self) -> float:
        """Return the largest learning rate that was used."""
        return max(self.series("train/lr").finite().values, default=0.0)

    @property
    def ranks(self) -> int:
        """Return the number of ranks on all machines."""
        return int(self.setting("trainer.n_gpus_per_node", 1)) * int(self.setting("trainer.nnodes", 1))

    @property
    def validation(self) -> Series:
        """Return the finite validation losses, without the part of the general prompts."""
        steps, values = [], []
        for row in (row for row in self.rows if "val/loss" in row):
            loss, tokens = finite_number(row.get("val/loss")), finite_number(row.get("val/tokens"))
            general = finite_number(row.get(f"val/{GENERAL}/tokens"))
            if tokens > general:
                loss = (loss * tokens - finite_number(row.get(f"val/{GENERAL}/loss")) * general) / (tokens - general)
            steps.append(row["step"])
            values.append(loss)
        return Series(steps, values).finite()

    @property
    def last_step(self) -> int:
        """Return the newest step, 0 before the first."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total_steps(self) -> int | None:
        """Return the planned number of steps; None where no step was trained."""
        if planned := self.setting("trainer.total_training_steps", 0):
            return int(planned)
        per_epoch = self.steps_per_epoch
        return per_epoch and round(per_epoch * self.setting("trainer.total_epochs", 1))

    @property
    def steps_per_epoch(self) -> int | None:
        """Return the number of steps in an epoch; None where no step was trained."""
        last = self.rows[-1] if self.rows else {}
        epoch = finite_number(last.get("epoch"))
        return round(last["step"] / epoch) if epoch > 0 else None


def read_run(path: str | Path) -> Run:
    """Return the run in a folder. Raises CheckpointError where it is none, or where its files cannot be read."""
    folder = user_path(path)
    if not (folder / FILE).is_file():
        problem = "has no metrics.jsonl" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {problem}; name a run folder, the trainer.output_dir of a run")
    rows = _read_lines(folder / FILE, required="step")
    if not rows:
        raise CheckpointError(f"{folder / FILE} has no step yet; try again when the run has trained one")
    samples = _read_lines(folder / SAMPLES, required="samples")
    wrong = [row["step"] for row in samples if not _has_answers(row["samples"])]
    if wrong:
        raise CheckpointError(f"{folder / SAMPLES} has no list of answers for step {wrong[0]}; remove its line")
    return Run(folder, rows, read_run_config(folder), samples, _read_data(folder / DATA))


def _read_lines(path: Path, required: str) -> list[dict[str, Any]]:
    """The rows of a file, none where it is absent; half a row at its end is of a run that still writes."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise CheckpointError(f"{path}, line {number} is not JSON; remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or required not in row:
            needed = " and ".join(dict.fromkeys(("step", required)))
            raise CheckpointError(f"{path}, line {number} is not a row of a run: it needs {needed}")
        if row.get("format_version", 1) > FORMAT_VERSION:
            raise CheckpointError(f"{path} was written by a newer version of sft_recipe; upgrade sft_recipe")
        rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def _has_answers(samples: Any) -> bool:
    return isinstance(samples, list) and all(
        isinstance(sample, dict) and isinstance(sample.get("answer"), str) for sample in samples
    )


def _read_data(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    lengths = data.get("lengths", {}) if isinstance(data, dict) else None
    counts = {**data, "lengths": 0, **lengths} if isinstance(lengths, dict) else {"lengths": None}
    if not all(isinstance(count, int) for count in counts.values()):
        raise CheckpointError(f"{path} is not the statistics of a run's data: it needs whole numbers as its counts")
    return data


def finite_number(value: Any) -> float:
    """Return a number; NaN for anything else and for numbers that arithmetic would carry beyond the range of floats."""
    return float(value) if isinstance(value, int | float) and (value == 0 or TINY < abs(value) < HUGE) else math.nan
