"""Defines the types of values whose checks are more than a limit; config/schema.py uses them."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator

AFTER_EACH_EPOCH: Literal["after_each_epoch"] = "after_each_epoch"
INT64_MAX = 2**63 - 1

Patterns = TypeVar("Patterns", str | list[str], str | list[str] | None)


def fits_int64(value: Any) -> Any:
    """Return the value. Raises ValueError for an integer that libraries cannot store in 64 bits."""
    if isinstance(value, int) and abs(value) > INT64_MAX:
        raise ValueError(f"it must be at most {INT64_MAX}")
    return value


def _regular_expression(value: Patterns) -> Patterns:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"it is not a regular expression: {error}") from None
    return value


def _not_empty(value: str | list[str]) -> str | list[str]:
    if not value:
        raise ValueError("it must name modules; the default is all-linear")
    return value


def _interval(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1 and value != -1:
        raise ValueError(f"it must be a number of steps, {AFTER_EACH_EPOCH}, or -1: only at the end")
    return value


def _decay_rates(value: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in value):
        raise ValueError("both must be at least 0 and less than 1")
    return value


TargetModules = Annotated[str | list[str], AfterValidator(_not_empty), AfterValidator(_regular_expression)]
ExcludedModules = Annotated[str | list[str] | None, AfterValidator(_regular_expression)]
StepInterval = Annotated[int | Literal["after_each_epoch"], AfterValidator(_interval)]
Betas = Annotated[tuple[float, float], AfterValidator(_decay_rates)]
Logger = Literal[
    "console", "wandb", "tensorboard", "mlflow", "swanlab", "trackio", "clearml", "vemlp_wandb", "rl_insight", "file"
]
