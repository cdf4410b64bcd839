"""Finds the keys of a record that are not read, so that nothing in the data is left out unnoticed."""

from collections.abc import Collection, Iterator
from typing import Any

from sft_recipe.data.turns import (
    ARGUMENT_KEYS,
    CALL_KEYS,
    LOSS_KEYS,
    REASONING_KEYS,
    TOOL_KEYS,
    Record,
    filled_key,
    is_call_role,
    is_empty,
    parse_json,
    role_of,
)

TURN_KEYS = {"name", "tool_call_id", *LOSS_KEYS, *REASONING_KEYS, *CALL_KEYS}
KEYS_OF_ROLE = {"system": set(TOOL_KEYS)}
PART_KEYS = {"type", "text", "value"}
KEYS_OF_PART = {
    "tool_result": {"name", "tool_call_id", "tool_use_id", "content"},
    "tool_use": {"id", "name", "input"},
    "thinking": {"thinking"},
}
CALL_OBJECT_KEYS, FUNCTION_KEYS = {"id", "type"}, {"name", *ARGUMENT_KEYS}


def unread_keys(record: Record, read: Collection[str], turn_fields: Collection[str]) -> tuple[str, ...]:
    """Return the names of the filled keys that are not read, each once: `id`, `messages[].note`.

    `read` are the keys of the record that are read, `turn_fields` those of them that may contain turns.
    """
    names = dict.fromkeys(key[:40] for key in _others(record, read))
    for field in turn_fields:
        for turn in _turns(record.get(field)):
            names |= dict.fromkeys(f"{field}[].{key[:80]}" for key in _of_turn(turn))
    return tuple(names)


def _turns(value: Any) -> list[Record]:
    """Return the turns of a field; a text is one where it is JSON with roles, else it is trained as it stands."""
    turns = list(_objects(value))
    is_text = isinstance(value, str) and all(is_empty(turn.get("role", turn.get("from"))) for turn in turns)
    return [] if is_text else turns


def _of_turn(turn: Record) -> Iterator[str]:
    """Yield what `_turns` in turns.py does not read of a turn."""
    role_key = filled_key(turn, ("role", "from"))
    content_key = "content" if role_key == "role" else "value"
    role = str(role_of(turn.get(role_key)))
    yield from _others(turn, {role_key, content_key} | TURN_KEYS | KEYS_OF_ROLE.get(role, set()))
    content, calls_key = turn.get(content_key), filled_key(turn, CALL_KEYS)
    if is_call_role(turn.get(role_key)):
        yield from (f"{content_key}[].{key}" for call in _objects(content) for key in _of_call(call))
    elif isinstance(content, list):
        for part in _objects(content):
            kind = str(part.get("type"))
            yield from (f"{content_key}[].{key}" for key in _others(part, PART_KEYS | KEYS_OF_PART.get(kind, set())))
            if kind == "tool_call":
                calls = _objects(part.get(filled_key(part, ("value", "text"))))
                yield from (f"{content_key}[].value.{key}" for call in calls for key in _of_call(call))
    yield from (f"{calls_key}[].{key}" for call in _objects(turn.get(calls_key)) for key in _of_call(call))


def _of_call(call: Record) -> Iterator[str]:
    function = call.get("function")
    if not isinstance(function, dict):
        yield from _others(call, CALL_OBJECT_KEYS | FUNCTION_KEYS)
        return
    yield from _others(call, CALL_OBJECT_KEYS | {"function"})
    yield from (f"function.{key}" for key in _others(function, FUNCTION_KEYS))


def _others(fields: Record, read: Collection[str]) -> list[str]:
    return [key for key, value in fields.items() if key not in read and not is_empty(value)]


def _objects(value: Any) -> Iterator[Record]:
    """Yield the objects of a list, or the only one, either of them also as JSON."""
    value = parse_json(value, "", "")
    yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict))
