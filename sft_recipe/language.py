"""The language of reports and findings: the one place where --lang and SFT_LANG are read, and English plurals."""

import os
import re
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any

from sft_recipe.errors import ConfigError

LANGUAGES = {"en": "English", "zh": "Chinese"}
VARIABLE = "SFT_LANG"


def chosen_language(option: str | None = None) -> str:
    """Return "en" or "zh": the value of --lang, else that of SFT_LANG, else "en"; zh_CN.UTF-8 is zh.

    Raises ConfigError for a language that there is no text in.
    """
    source, text = (VARIABLE, os.environ.get(VARIABLE, "")) if option is None else ("--lang", option)
    if option is None and not text:
        return "en"
    language = re.split(r"[-_.]", text.lower())[0]
    if language not in LANGUAGES:
        known = " or ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
        raise ConfigError(f"{source} {text!r}: there is no text in this language; use {known}")
    return language


def set_language(option: str | None) -> None:
    """Let --lang, where it was given, count in this process and in those that it starts. Raises ConfigError."""
    if option is not None:
        os.environ[VARIABLE] = chosen_language(option)


def translator(language: str, chinese: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that translates English text by `chinese` if that is the language; other text stays."""
    texts = chinese if language == "zh" else {}
    return lambda text: texts.get(text, text)


def plural(number: int, noun: str) -> str:
    """Return a number with its English noun: `1 step`, `2,000 steps`."""
    return f"{number:,} {noun if number == 1 else noun + ('es' if noun.endswith('ch') else 's')}"


class _Counts(Formatter):
    """Formats as str.format does, and numbers with their nouns."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec.startswith("# "):
            return plural(value, format_spec.removeprefix("# "))
        if "|" in format_spec:
            return format_spec.split("|")[value != 1]
        return str(super().format_field(value, format_spec))


def fill(text: str, /, **values: Any) -> str:
    """Return the text with values in its fields: `{steps:# step}` is `1 step` or `2 steps`, `{steps:is|are}` a word."""
    return _Counts().vformat(text, (), values)
