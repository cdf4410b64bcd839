"""Parses YAML and JSON, and refuses what would be read only in part, or could not be processed in reasonable time."""

import json
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from typing import Any

import yaml

from sft_recipe.errors import ConfigError

MAX_DEPTH = 100
MAX_VALUES = 100_000  # each one as often as aliases repeat it
TOO_DEEP = f"lists or objects are nested more than {MAX_DEPTH} levels deep"
TOO_MANY = f"it has more than {MAX_VALUES:,} values, those that aliases repeat included"


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises ValueError for malformed YAML.

    Raises ConfigError for a key that occurs twice in an object, too many levels, and too many values.
    """
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    _check_size(value)
    return value


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError for malformed JSON, and ConfigError as `parse_yaml` does."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_pairs)
    except RecursionError:
        raise ConfigError(TOO_DEEP) from None
    _check_size(value)
    return value


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice; one that `<<` merges may be there as well."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _check_unique(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        return node


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique(key for key, _ in pairs)
    return dict(pairs)


def _check_unique(keys: Iterable[Hashable]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise ConfigError(f"the key {str(key)[:40]!r} occurs twice in an object; keep one of them")
        seen.add(key)


def _check_size(value: Any) -> None:
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, dict | list | tuple | set)]
        if not level:
            return
        level = list(islice(_children(level), MAX_VALUES + 1 - count))
        count += len(level)
        if count > MAX_VALUES:
            raise ConfigError(TOO_MANY)
    raise ConfigError(TOO_DEEP)


def _children(parents: list[Any]) -> Iterator[Any]:
    for parent in parents:
        yield from parent.values() if isinstance(parent, dict) else parent
