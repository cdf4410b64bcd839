"""The base of all groups of keys, and the flag of a key."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from sft_recipe.config import values


def flag(name: str, short: str | None = None, shown_default: str | None = None) -> dict[str, Any]:
    """Name the flag of a key; `shown_default` is how --help writes a default that is null."""
    return {"flag": name, "short": short, "shown_default": shown_default}


class Group(BaseModel):
    """Unknown keys are refused, and nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())

    _fits_int64 = field_validator("*")(values.fits_int64)
