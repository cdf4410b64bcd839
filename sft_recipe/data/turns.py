"""Converts the turns of a record, in all their spellings, to Messages: roles, typed parts, tool calls, weights."""

import json
from collections.abc import Iterable
from typing import Any

from sft_recipe.data.messages import Message, check_text, data_error, json_type

Record = dict[str, Any]
Turn = tuple[str, Message]  # the name of the field with the turn's content, for error messages; and the turn

# Other names for the roles.
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # the content of such a turn is the call, as JSON
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def turns_of(value: Any, role: str, field: str, source: str) -> list[Turn]:
    """Return the turns in a field: a text is one turn of `role`; an object is a turn, and a list has several.

    Raises DataError, naming `source` and `field`, for a turn that cannot be read.
    """
    if isinstance(value, list):
        return turn_list(field, {field: value}, source)
    if isinstance(value, dict):
        return _turns(value, field, source)
    return [(field, Message(role, value))]


def turn_list(field: str, record: Record, source: str) -> list[Turn]:
    """Return the turns in a record's list, which may be given as JSON (in a CSV cell). Raises DataError."""
    turns = parse_json(record[field])
    if not isinstance(turns, list) or not turns:
        actual = "an empty list" if turns == [] else json_type(turns)
        raise data_error(source, f"{field} is {actual}; expected a list of turns with role and content", "type")
    return [turn for index, item in enumerate(turns) for turn in _turns(item, f"{field}[{index}]", source)]


def _turns(turn: Any, name: str, source: str) -> list[Turn]:
    """Convert an item of a list: one turn, or several if a user turn contains tool results."""
    if not isinstance(turn, dict):
        raise data_error(source, f"{name} is {json_type(turn)}; expected an object with role and content", "type")
    keys = ["from", "value"] if "role" not in turn and "from" in turn else ["role", "content"]
    calls = _first(turn, ("tool_calls", "function_call"))
    for key in keys:
        if key not in turn and not (key == "content" and calls):
            problem = f"{name}.{key} is missing; expected {' and '.join(keys)}, found {key_names(turn)}"
            raise data_error(source, problem)
    role, content = turn[keys[0]], turn.get(keys[1])
    field = f"{name}.{keys[1]}"
    train = _train(turn, role, name, source)
    if isinstance(role, str) and role in CALL_ROLES:
        return [(field, Message("assistant", "", tool_calls=_tool_calls(content, field, source), train=train))]
    if isinstance(role, str):
        role = ROLE_NAMES.get(role, role)
    if isinstance(content, list):
        return [(field, part) for part in _parts(content, role, train, field, source)]
    text: Any = "" if content is None and calls else content
    message = Message(
        role,
        text,
        reasoning=_first(turn, REASONING_KEYS) or "",
        tool_calls=_tool_calls(calls, f"{name}.tool_calls", source) if calls else (),
        name=turn.get("name") or "" if role == "tool" else "",
        tool_call_id=turn.get("tool_call_id") or "",
        train=train,
    )
    return [(field, message)]


def _parts(parts: list[Any], role: str, train: bool, field: str, source: str) -> list[Message]:
    """Convert a content of typed parts, `{"type": "text", "text": ...}`.

    Chat templates write reasoning, text and tool calls in this order, so that parts must come in it.
    """
    contents: dict[str, Any] = {"reasoning": [], "text": [], "tool_call": []}
    messages: list[Message] = []
    for index, part in enumerate(parts):
        name = f"{field}[{index}]"
        if not isinstance(part, dict) or "type" not in part:
            problem = f"{name} is {json_type(part)}; expected an object with type, and text or value"
            raise data_error(source, problem, "type")
        kind = part["type"]
        value = _first(part, ("text", "value"))
        if kind == "tool_result":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            name, call = part.get("name") or "", part.get("tool_call_id") or ""
            messages.append(Message("tool", text, name=name, tool_call_id=call))
        elif kind not in contents:
            raise data_error(source, f"{name}.type is {kind!r}; expected {', '.join(contents)} or tool_result", "type")
        elif any(later and contents[later] for later in list(contents)[list(contents).index(kind) + 1 :]):
            problem = f"{name} is a {kind} part after a part of a later type; expected {', '.join(contents)} in order"
            raise data_error(source, problem)
        elif kind == "tool_call":
            contents[kind] += _tool_calls(value, name, source)
        else:
            contents[kind].append(check_text(value, f"{name}.text", source))
    reasoning, text = "".join(contents["reasoning"]), "".join(contents["text"])
    if text or reasoning or contents["tool_call"] or not messages:
        messages.append(Message(role, text, reasoning, tuple(contents["tool_call"]), train=train))
    return messages


def _train(turn: Record, role: Any, name: str, source: str) -> bool:
    """Return whether a turn is trained on: `train` (true, false) or `weight` (1, 0), where given."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise data_error(source, f"{name}.train is {json_type(train)}; expected true or false", "type")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        actual = weight if isinstance(weight, int | float) else json_type(weight)
        problem = f"{name}.weight is {actual}; expected 1 (train on this turn) or 0 (only show it to the model)"
        raise data_error(source, problem, "type")
    if train is not None and weight is not None and train != bool(weight):
        raise data_error(source, f"{name}.train and {name}.weight contradict each other; keep one of them")
    is_requested = train if train is not None else None if weight is None else bool(weight)
    is_assistant = role in CALL_ROLES or ROLE_NAMES.get(role, role) == "assistant" if isinstance(role, str) else True
    if is_requested and not is_assistant:
        problem = f"{name} asks to train on a turn of {role!r}; only assistant turns are trained on"
        raise data_error(source, problem, "roles")
    return is_requested is not False


def _tool_calls(value: Any, name: str, source: str) -> tuple[Record, ...]:
    """Convert one call, a list of calls, or either as JSON, to the form that chat templates expect."""
    value = parse_json(value)
    calls = value if isinstance(value, list) else [value]
    return tuple(_tool_call(call, f"{name}[{index}]", source) for index, call in enumerate(calls))


def _tool_call(call: Any, name: str, source: str) -> Record:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise data_error(source, f"{name} is not a tool call; expected an object with name and arguments", "tools")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments)
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        actual = "not a JSON object" if isinstance(arguments, str) else json_type(arguments)
        raise data_error(source, f"{name}.arguments is {actual}; expected an object: {{name: value}}", "tools")
    converted = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **converted} if call.get("id") else converted


def key_names(record: Record) -> str:
    """Return the keys of a record for a message, each at most 40 characters."""
    return ", ".join(key[:40] for key in record) or "none"


def _first(record: Record, keys: Iterable[str]) -> Any:
    """Return the value of the first key whose value is not empty."""
    return next((record[key] for key in keys if record.get(key) not in (None, "", [], {})), None)


def parse_json(value: Any) -> Any:
    """Return what a text contains as JSON (lists in CSV cells, ShareGPT's tools, OpenAI's arguments), else `value`."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
