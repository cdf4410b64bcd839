"""Defines the types of values whose checks are more than a limit; config/schema.py uses them."""

import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator

from sft_recipe.config.reserved import NOT_TEMPLATE_VARIABLES

AFTER_EACH_EPOCH: Literal["after_each_epoch"] = "after_each_epoch"
INT64_MAX = 2**63 - 1
# transformers' names of schedules that have another name here.
TRANSFORMERS_SCHEDULERS = {
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}

Patterns = TypeVar("Patterns", str | list[str], str | list[str] | None)


def is_number(annotation: Any) -> bool:
    """Return whether a type, or a part of a union, is int or float, and none is bool."""
    parts = get_args(annotation) or (annotation,)
    return bool not in parts and any(
        part in (int, float) or (part is not annotation and is_number(part)) for part in parts
    )


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


def _regular_expressions(value: list[str]) -> list[str]:
    for entry in value:
        _regular_expression(entry)
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


def _order(value: Any) -> Any:
    """The older key data.shuffle was true or false."""
    return {True: "shuffle", False: "file"}[value] if isinstance(value, bool) else value


def _template_variables(value: dict[str, Any]) -> dict[str, Any]:
    if taken := next((name for name in NOT_TEMPLATE_VARIABLES if name in value), None):
        raise ValueError(f"{taken} comes from the data or from training; remove it")
    return value


TargetModules = Annotated[str | list[str], AfterValidator(_not_empty), AfterValidator(_regular_expression)]
ExcludedModules = Annotated[str | list[str] | None, AfterValidator(_regular_expression)]
WeightNames = Annotated[list[str], AfterValidator(_regular_expressions)]
StepInterval = Annotated[int | Literal["after_each_epoch"], AfterValidator(_interval)]
SchedulerType = Annotated[
    Literal["cosine", "linear", "constant", "onecycle", "wsd", "inverse_sqrt", "polynomial"],
    BeforeValidator(lambda value: TRANSFORMERS_SCHEDULERS.get(value, value) if isinstance(value, str) else value),
]
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_template_variables)]
Betas = Annotated[tuple[float, float], AfterValidator(_decay_rates)]
Order = Annotated[Literal["shuffle", "file"], BeforeValidator(_order)]
Logger = Literal[
    "console", "wandb", "tensorboard", "mlflow", "swanlab", "trackio", "clearml", "vemlp_wandb", "rl_insight", "file"
]
