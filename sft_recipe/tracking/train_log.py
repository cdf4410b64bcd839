"""train.log: the course of a run as text for tail and grep, one line a step and one an epoch."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipe.files import write_text

FILE = "train.log"


class TrainLog:
    """The lines of all rows of metrics.jsonl, which has every number; a line that cannot be written is left out."""

    def __init__(self, path: Path, rows: Sequence[dict[str, Any]]):
        """Begin with the lines of the rows that a resumed run has already. Raises OSError."""
        self.path = path
        write_text(path, "".join(map(lines, rows)))

    def add(self, row: dict[str, Any]) -> None:
        """Append the lines of a row."""
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(lines(row))


def lines(row: dict[str, Any]) -> str:
    """Return the line of an optimizer step, and at the end of an epoch a second one; none for other rows."""
    if "train/loss" not in row:
        return ""
    text = (
        f"step: {row['step']}, epoch: {row['epoch']:.4f}, loss: {_number(row['train/loss'], '.4f')}, "
        f"lr: {row['train/lr']:.6e}, grad_norm: {_number(row['train/grad_norm'], '.4f')}, "
        f"tokens_per_s: {row['perf/tokens_per_s']:.0f}\n"
    )
    if row.get("train/epoch_loss") is None:
        return text
    return f"{text}epoch: {round(row['epoch'])}, avg_loss: {row['train/epoch_loss']:.4f}\n"


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)
