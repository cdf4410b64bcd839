"""Parses JSON and refuses what is valid JSON but would be read only in part, or cannot be processed further."""

import json
import sys
from typing import Any

MAX_DEPTH = 100
TOO_DEEP = "Arrays or objects nested too deeply"


class JsonProblem(ValueError):
    """Says why a value that is valid JSON is refused."""


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """Parse the value that begins at `start`; returns it and the position after it.

    Raises JSONDecodeError for malformed JSON. Raises JsonProblem, possibly before the end of the value has been seen,
    for a key that occurs twice in an object, a number with too many digits, and more than MAX_DEPTH levels.
    """
    value, end = _run(_STRICT, text, start)
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise JsonProblem(f"arrays or objects are nested more than {MAX_DEPTH} levels deep; flatten them")
    return value, end


def skip(text: str, start: int) -> tuple[str, int]:
    """Return the text of the value that begins at `start`, which has a JsonProblem, and the position after it.

    Raises JSONDecodeError.
    """
    _, end = _run(_LENIENT, text, start)
    return text[start:end], end


def loads(text: str) -> Any:
    """Parse a text without white space at its start. Raises JSONDecodeError and JsonProblem, as `decode` does."""
    value, end = decode(text)
    if text[end:].strip(" \t\r\n"):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _run(decoder: json.JSONDecoder, text: str, start: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, start)
    except RecursionError as error:
        raise json.JSONDecodeError(TOO_DEEP, text, start) from error
    except (json.JSONDecodeError, JsonProblem):
        raise
    except ValueError as error:  # Python's limit for numbers
        raise JsonProblem(
            f"a number has more than {sys.get_int_max_str_digits():,} digits; write it as text"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonProblem(f"the key {twice[:40]!r} occurs twice in an object; keep one of them")
    return values


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while nested := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [item for parent in nested for item in (parent.values() if isinstance(parent, dict) else parent)]
    return depth


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)
_LENIENT = json.JSONDecoder(parse_int=str)
