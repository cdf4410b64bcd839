"""Builds the typed configuration from a plain tree, and explains what is wrong with it in terms of keys."""

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sft_recipe.config.schema import Config
from sft_recipe.config.values import AFTER_EACH_EPOCH
from sft_recipe.errors import ConfigError


def build_config(tree: dict[str, Any]) -> Config:
    """Validate a resolved tree of plain values and return the typed configuration.

    Raises ConfigError that lists all mistakes at once, each with the nearest valid key or the accepted values.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = _explain_all(error.errors())
        number = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise ConfigError("\n".join([f"the configuration has {number}:", *(f"  - {line}" for line in lines)])) from None


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name and the definition of every key, groups not included."""
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from fields(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def all_keys() -> list[str]:
    """Return the dotted names of all keys."""
    return [key for key, _ in fields()]


def text_keys() -> list[str]:
    """Return the dotted names of the keys that accept text, or a list of texts."""
    return [key for key, info in fields() if str in _types(info)]


def not_groups(tree: Any) -> str:
    """Return which group is a value instead of keys, or an empty text; a reference to other keys may be a group."""
    for group in Config.model_fields:
        value = tree.get(group, {})
        if not isinstance(value, dict) and "${" not in str(value):
            return f"{group}{_not_a_group(value)}"
    return ""


def missing_groups(tree: Any) -> str:
    """Return which groups a configuration lacks, and what config.yaml should name, or an empty text."""
    missing = [group for group, info in Config.model_fields.items() if info.is_required() and group not in tree]
    if not missing:
        return ""
    verb, these = ("is", "this group") if len(missing) == 1 else ("are", "these groups")
    entries = ", ".join(f"- {group}: default" for group in missing)
    return f"{', '.join(missing)} {verb} not set: the defaults list of config.yaml must name {these} ({entries})"


def flag_names(info: FieldInfo) -> list[str]:
    """Return the names of a key's flag, the short one last; an empty list if the key has no flag."""
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    return [str(name) for name in (extra.get("flag"), extra.get("short")) if name]


def nearest(name: str, known: list[str]) -> str:
    """Return ' Did you mean X?' for the nearest of the known names, or an empty string if none is near."""
    by_flag = {flag: key for key, info in fields() if key in known for flag in flag_names(info)}
    leaves = by_flag | {key.rsplit(".", 1)[-1]: key for key in known}
    last = name.rsplit(".", 1)[-1]
    same = [key for key in known if key.lower() == name.lower()] or ([leaves[last]] if last in leaves else [])
    close = same or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close and (leaf := difflib.get_close_matches(last, leaves, n=1, cutoff=0.7)):
        close = [leaves[leaf[0]]]
    return f" Did you mean {close[0]}?" if close else ""


def _types(info: FieldInfo) -> tuple[Any, ...]:
    annotation = info.annotation
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _explain_all(problems: list[Any]) -> list[str]:
    """Return one line per key; for a key with several types the last problem is the most specific.

    A key with the value of another one, which is wrong as well, is no mistake.
    """
    complaints: dict[str, list[str]] = {}
    extras = {key: info.json_schema_extra for key, info in fields()}
    references = {
        key: str(extra["yaml"]) for key, extra in extras.items() if isinstance(extra, dict) and "yaml" in extra
    }
    given = {".".join(map(str, problem["loc"])): problem["input"] for problem in problems}
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"] if _is_key_part(part))
        referred = references.get(key, "").removeprefix("${").removesuffix("}")
        if not (referred and given.get(referred) == problem["input"]):
            complaints.setdefault(key, []).append(_explain(key, problem))
    return [(key + texts[-1]).removeprefix(": ") for key, texts in complaints.items()]


def _explain(key: str, problem: Any) -> str:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f" is not a key.{nearest(key, all_keys())}"
    if kind == "missing" and isinstance(problem["loc"][-1], int):
        return f" is {given!r}; it has too few values"
    if kind == "missing" and key in Config.model_fields:
        return " is not set: the defaults list of config.yaml must name this group"
    if kind == "missing":
        return " is not set"
    if kind == "string_too_short":
        return " is empty; it needs a value"
    if kind == "bool_parsing":
        return f" is {given!r}; it must be true or false"
    if kind == "model_type":
        return _not_a_group(given)
    if kind == "value_error":
        of_group = isinstance(given, dict) and key not in all_keys()
        return f": {context['error']}" if of_group else f" is {given!r}; {context['error']}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", "").replace(" or ", ", ")
        also = {AFTER_EACH_EPOCH: "a number of steps, ", "auto": "true, false, "}  # the other type of such a key
        expected = also.get(expected, "") + expected
        return f" is {given!r}; it must be one of {expected}.{nearest(str(given), expected.split(', '))}"
    return f" is {given!r}; {problem['msg'].replace('Input should', 'it should')}"


def _not_a_group(value: Any) -> str:
    return f" is {value!r}, but it is a group of keys"


def _is_key_part(part: Any) -> bool:
    """Return False for the union branch (str, list[str], literal[...]) that pydantic adds to the path of a key."""
    names, prefixes = ("str", "int", "bool", "float"), ("list[", "literal[", "dict[", "function-")
    return isinstance(part, str) and part not in names and not part.startswith(prefixes)
