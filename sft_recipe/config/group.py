"""The base of all groups of keys, and the flag of a key."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from sft_recipe.config import values


def flag(name: str, short: str | None = None, shown_default: str | None = None) -> dict[str, Any]:
    """Name the flag of a key; `shown_default` is how --help writes a default that is null."""
    return {"flag": name, "short": short, "shown_default": shown_default}


class Group(BaseModel):
    """Unknown keys are refused, and nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as numbers: pydantic reads them as 1 and 0."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and values.is_number(annotation):
            raise ValueError("it should be a number")
        return value

    _fits_int64 = field_validator("*")(values.fits_int64)
