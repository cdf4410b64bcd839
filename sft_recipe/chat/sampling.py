"""How the tokens of an answer are chosen; one set of options for flags, files and requests.

This module uses only the standard library, so that --help works before the first installation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sft_recipe.errors import ConfigError

# Option -> lowest and highest value, and whether it is a whole number.
LIMITS: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, False),
    "top_p": (0, 1, False),
    "top_k": (0, 2**31 - 1, True),
    "repetition_penalty": (0.01, 100, False),
    "max_new_tokens": (1, 2**31 - 1, True),
    "seed": (0, 2**63 - 1, True),
}
MAX_STOP_STRINGS = 16
LOWEST_TEMPERATURE = 0.01  # below it decoding is greedy: the same answers, without overflows of scores


@dataclass(frozen=True)
class Sampling:
    """Sampling has the options of an answer; `temperature` 0 is greedy decoding, `top_k` 0 keeps all tokens.

    `stop` are texts that end an answer and are not part of it. Without a `seed` answers differ from run to run.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def updated(self, options: Mapping[str, Any]) -> Sampling:
        """Return these options with those that `options` has; None is as if it were not there.

        A `top_p` or `top_k` that restricts the tokens makes greedy decoding sampling at temperature 1, unless
        `options` has a temperature. Raises ConfigError that names an option with an invalid value.
        """
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            if name == "stop":
                given[name] = _checked_stop(value)
            else:
                given[name] = _checked(name, value)
        if given.get("temperature", 1) < LOWEST_TEMPERATURE:
            given["temperature"] = 0.0
        restricts = given.get("top_p", 1) < 1 or given.get("top_k", 0) > 0
        if restricts and not self.temperature and "temperature" not in given:
            given["temperature"] = 1.0
        return replace(self, **given)


def _checked(name: str, value: Any) -> int | float:
    lowest, highest, is_whole = LIMITS[name]
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:
        number = "a whole number" if is_whole else "a number"
        raise ConfigError(f"{name} is {value!r:.40}; it must be {number} from {lowest} to {highest}")
    return value if is_whole else float(value)  # JSON writes 2.0 as 2, and transformers distinguishes them


def _checked_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop is {value!r}; it must be a text or a list of texts that are not empty")
    if len(texts) > MAX_STOP_STRINGS:
        raise ConfigError(f"stop has {len(texts)} texts; at most {MAX_STOP_STRINGS} are possible")
    return tuple(texts)
