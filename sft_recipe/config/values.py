"""Defines the types of values whose checks are more than a limit; config/schema.py uses them."""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator

AFTER_EACH_EPOCH: Literal["after_each_epoch"] = "after_each_epoch"
StepInterval = int | Literal["after_each_epoch"]

Patterns = TypeVar("Patterns", str | list[str], str | list[str] | None)


def _regular_expression(value: Patterns) -> Patterns:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


def _not_empty(value: str | list[str]) -> str | list[str]:
    if not value:
        raise ValueError("it is empty; the default is all-linear")
    return value


TargetModules = Annotated[str | list[str], AfterValidator(_not_empty), AfterValidator(_regular_expression)]
ExcludedModules = Annotated[str | list[str] | None, AfterValidator(_regular_expression)]
