"""Tables of the generated answers, for the loggers that have tables; verl's own have no column for the reference."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import import_module
from typing import Any

from sft_recipe.evaluation.generation import Sample

NAME = "eval/answers"
COLUMNS = ["step", "set", "prompt", "reference", "answer", "is_truncated"]


def log_answers(loggers: Mapping[str, Any], step: int, samples: Sequence[Sample]) -> None:
    """Log the answers of a step as a table, a row each, to all of verl's `loggers` that have tables.

    Answers to `eval.prompts` have an empty reference. Raises what a logger raises.
    """
    rows = [[step, one.set, one.prompt, one.reference or "", one.answer, one.is_truncated] for one in samples]
    for name in loggers.keys() & TABLES.keys():
        TABLES[name](loggers[name], step, rows)


def _wandb(wandb: Any, step: int, rows: list[list[Any]]) -> None:
    wandb.log({NAME: wandb.Table(columns=COLUMNS, data=rows)}, step=step)


def _tensorboard(adapter: Any, step: int, rows: list[list[Any]]) -> None:
    """TensorBoard renders Markdown, in which an HTML table stays as it is."""
    lines = [_cells("th", COLUMNS), *(_cells("td", row) for row in rows)]
    adapter.writer.add_text(NAME, f"<table>{''.join(lines)}</table>", step)


def _cells(tag: str, values: Sequence[Any]) -> str:
    texts = (escape(str(value)).replace("\n", "<br>") for value in values)
    return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"


def _mlflow(_: Any, step: int, rows: list[list[Any]]) -> None:
    """All steps share one file: mlflow appends to it."""
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    import_module("mlflow").log_table(columns, f"{NAME}.json")


def _swanlab(swanlab: Any, step: int, rows: list[list[Any]]) -> None:
    swanlab.log({NAME: swanlab.echarts.Table().add(COLUMNS, rows)}, step=step)


def _trackio(adapter: Any, step: int, rows: list[list[Any]]) -> None:
    adapter.log({NAME: adapter.trackio.Table(columns=COLUMNS, data=rows)}, step=step)


TABLES: dict[str, Callable[[Any, int, list[list[Any]]], None]] = {
    "wandb": _wandb,
    "vemlp_wandb": _wandb,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
    "trackio": _trackio,
}
