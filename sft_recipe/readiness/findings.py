"""The result of one check: a status, what was found, and the remedy, as sentences in English or Chinese."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sft_recipe.language import fill, translator
from sft_recipe.readiness.chinese import CHINESE, NAMES

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """The result of the check `name`.

    `text` and `remedy` are English sentences with fields of `values` in braces. A value may be English words, or a
    dictionary of them with their amounts.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def message(self, language: str) -> str:
        """Return what was found, in "en" or "zh"."""
        return self._in(language, self.text)

    def advice(self, language: str) -> str:
        """Return what to do, in "en" or "zh"; empty where there is nothing to do."""
        return self._in(language, self.remedy)

    def as_json(self, language: str) -> dict[str, str]:
        """Return the check as `--json` prints it."""
        return {
            "name": self.name,
            "status": self.status,
            "message": self.message(language),
            "remedy": self.advice(language),
        }

    def title(self, language: str) -> str:
        """Return the name in "en" or "zh"."""
        return translator(language, NAMES)(self.name)

    def _in(self, language: str, text: str) -> str:
        translate = translator(language, CHINESE)
        return fill(translate(text), **{name: _value(value, translate) for name, value in self.values.items()})


def _value(value: Any, translate: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{translate(name)} {text}" for name, text in value.items())
    return translate(value) if isinstance(value, str) else value


def passed(name: str, text: str, /, **values: Any) -> Check:
    """Return a check with nothing to do."""
    return Check(name, "ok", text, "", values)


def warned(name: str, text: str, remedy: str, /, **values: Any) -> Check:
    """Return a check of something that does not stop the run."""
    return Check(name, "warning", text, remedy, values)


def failed(name: str, text: str, remedy: str = "", /, **values: Any) -> Check:
    """Return a check of something that would stop the run."""
    return Check(name, "error", text, remedy, values)
