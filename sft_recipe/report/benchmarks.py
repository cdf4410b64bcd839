"""The results of benchmarks that scripts/evaluate.py has left in a run folder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "evaluations"


@dataclass(frozen=True)
class Benchmark:
    """One score of a task: `error` is its standard error, `examples` how many were answered, None if unknown."""

    task: str
    metric: str
    checkpoint: str
    value: float
    error: float | None
    examples: int | None


def read_benchmarks(folder: Path) -> list[Benchmark]:
    """Return the newest result of each task, metric and checkpoint, the newest checkpoint last.

    Files that cannot be read are left out.
    """
    found: dict[tuple[str, str, str], Benchmark] = {}
    for report in sorted(filter(None, map(_read, folder.glob(f"{FOLDER}/*.json"))), key=lambda one: str(one["time"])):
        found |= {(one.task, one.metric, one.checkpoint): one for one in _results(report)}
    return sorted(found.values(), key=lambda one: (one.task, one.metric, _step(one.checkpoint)))


def _step(checkpoint: str) -> int:
    number = checkpoint.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


def _results(report: dict[str, Any]) -> Iterator[Benchmark]:
    for task, result in report["tasks"].items():
        for metric, score in result["scores"].items():
            if isinstance(score.get("value"), int | float):
                yield Benchmark(
                    task, metric, str(report["checkpoint"]), score["value"], score.get("stderr"), result.get("samples")
                )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if list(_results(report)) and "time" in report else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
