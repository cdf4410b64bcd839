"""Converts the turns of a record, in all their spellings, to Messages: roles, parts, tool calls, loss switches."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sft_recipe.data.content_parts import normalized_part
from sft_recipe.data.json_text import JsonProblem, loads
from sft_recipe.data.messages import Message, check_text, data_error, json_of, json_type

Record = dict[str, Any]

CALL_ROLES = ("function_call", "tool_call")  # the content of such a turn is the call, as JSON
# Other names for the roles, in lower case.
OTHER_NAMES = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard", *CALL_ROLES),
    "system": ("developer",),
    "tool": ("function", "observation", "ipython", "tool_response", "tool_result", "function_response"),
}
ROLE_NAMES = {name: role for role, names in OTHER_NAMES.items() for name in (role, *names)}
# The names of an assistant's reasoning, in records and in chat templates.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
ARGUMENT_KEYS = ("arguments", "parameters")
TOOL_KEYS = ("tools", "functions")  # schemas, beside the turns or in the system turn
LOSS_KEYS = ("train", "weight", "loss_weight", "loss", "trainable", "loss_mask", "mask")  # all mean the same
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")


class Turn(NamedTuple):
    """A Turn is a message, the name of the field with its content (for error messages), and the tools beside it."""

    field: str
    message: Message
    tools: Any = None


def role_of(name: Any) -> Any:
    """Return the role with this name, in capitals or not, or else the name, which is not always a text."""
    return ROLE_NAMES.get(name.lower(), name) if isinstance(name, str) else name


def is_call_role(name: Any) -> bool:
    """Return whether the content of a turn of the role with this name is a call, as JSON."""
    return isinstance(name, str) and name.lower() in CALL_ROLES


def turns_of(value: Any, role: str, field: str, source: str) -> list[Turn]:
    """Return the turns in a field: a text is one turn of `role`; an object is a turn, and a list has several.

    Raises DataError, naming `source` and `field`, for a turn that cannot be read.
    """
    if isinstance(value, list):
        return turn_list(field, {field: value}, source)
    if isinstance(value, dict):
        return _turns(value, field, source)
    return [Turn(field, Message(role, value))]


def turn_list(field: str, record: Record, source: str) -> list[Turn]:
    """Return the turns in a record's list, which may be given as JSON (in a CSV cell). Raises DataError."""
    turns = parse_json(record[field], field, source)
    if not isinstance(turns, list) or not turns:
        actual = "an empty list" if turns == [] else json_type(turns)
        raise data_error(source, f"{field} is {actual}; expected a list of turns with role and content", "type")
    result: list[Turn] = []
    for index, item in enumerate(turns):
        name = f"{field}[{index}]"
        converted = _turns(item, name, source)
        is_call = is_call_role(item.get(filled_key(item, ("role", "from"))))
        if is_call and result and result[-1].message.role == "assistant":
            converted = [_with_call(result.pop(), converted[0].message, name, source)]
        result += converted
    return result


def _with_call(turn: Turn, call: Message, name: str, source: str) -> Turn:
    """Return an assistant turn together with the call that follows in an item without text: the model makes both in one
    turn, and a turn that ended before the call would teach it to stop there.
    """
    message = turn.message
    if call.train != message.train:
        problem = f"{name} continues the assistant's turn before it, but only one of them is trained on"
        raise data_error(source, f"{problem}; set both to true or both to false")
    if call.reasoning:
        problem = (
            f"{name} has reasoning after the text of the same turn; put it in the item before, which begins the turn"
        )
        raise data_error(source, problem)
    return turn._replace(message=replace(message, tool_calls=message.tool_calls + call.tool_calls))


def _turns(turn: Any, name: str, source: str) -> list[Turn]:
    """Convert an item of a list: one turn, or several if a user turn contains tool results."""
    if not isinstance(turn, dict):
        raise data_error(source, f"{name} is {json_type(turn)}; expected an object with role and content", "type")
    check_media(turn, f"{name}.", source)
    is_sharegpt = is_null(turn.get("role")) and not is_null(turn.get("from"))
    keys = ("from", "value") if is_sharegpt else ("role", "content")
    calls = one_of(turn, CALL_KEYS, f"{name}.", source)
    tools = one_of(turn, TOOL_KEYS, f"{name}.", source) if role_of(turn.get(keys[0])) == "system" else None
    for key in keys:
        if key not in turn and not (key == "content" and (calls or tools)):
            problem = f"{name}.{key} is missing; expected {' and '.join(keys)}, found {key_names(turn)}"
            raise data_error(source, problem)
    role = turn[keys[0]]
    content: Any = None if is_null(turn.get(keys[1])) else turn[keys[1]]
    field = f"{name}.{keys[1]}"
    train = _is_trained(turn, role, name, source)
    if is_call_role(role) and not calls:
        tool_calls, content = convert_calls(content, field, source), ""
    else:
        tool_calls = convert_calls(calls, f"{name}.tool_calls", source) if calls else ()
    message = Message(
        role_of(role),
        "" if content is None and (calls or tools) else content,
        reasoning=one_of(turn, REASONING_KEYS, f"{name}.", source) or "",
        tool_calls=tool_calls,
        name=_value(turn, "name"),
        tool_call_id=_value(turn, "tool_call_id"),
        train=train,
    )
    messages = _parts(content, message, field, source) if isinstance(content, list) else [message]
    return [Turn(field, part, tools) for part in messages]


def _parts(parts: list[Any], turn: Message, field: str, source: str) -> list[Message]:
    """Convert a content of typed parts, `{"type": "text", "text": ...}`; `turn` has what is given beside them.

    Chat templates write reasoning, text and tool calls in this order, so that parts must come in it.
    """
    contents: dict[str, Any] = {"reasoning": [], "text": [], "tool_call": []}
    messages: list[Message] = []
    for index, part in enumerate(parts):
        name = f"{field}[{index}]"
        if not isinstance(part, dict) or "type" not in part:
            actual = f"{json_type(part)} without type" if isinstance(part, dict) else json_type(part)
            raise data_error(source, f"{name} is {actual}; expected an object with type, and text or value", "type")
        part = normalized_part(part, name, source)
        kind = part["type"]
        value = one_of(part, ("text", "value"), f"{name}.", source)
        if kind == "tool_result":
            messages.append(_tool_result(part, value, turn, name, source))
        elif not isinstance(kind, str) or kind not in contents:
            raise data_error(source, f"{name}.type is {kind!r}; expected {', '.join(contents)} or tool_result", "type")
        elif any(later and contents[later] for later in list(contents)[list(contents).index(kind) + 1 :]):
            problem = f"{name} is a {kind} part after a part of a later type; expected {', '.join(contents)} in order"
            raise data_error(source, problem)
        elif kind == "tool_call":
            contents[kind] += convert_calls(value, name, source)
        else:
            contents[kind].append(check_text(value, f"{name}.text", source))
    reasoning, text, calls = "".join(contents["reasoning"]), "".join(contents["text"]), tuple(contents["tool_call"])
    for what, is_repeated in ("reasoning", reasoning and turn.reasoning), ("tool calls", calls and turn.tool_calls):
        if is_repeated:
            raise data_error(source, f"{field} has {what}, and so has the turn beside it; keep one of them")
    reasoning, calls = reasoning or turn.reasoning, calls or turn.tool_calls
    if text or reasoning or calls or not messages:
        messages.append(replace(turn, content=text, reasoning=reasoning, tool_calls=calls))
    return messages


def _tool_result(part: Record, value: Any, turn: Message, name: str, source: str) -> Message:
    if "text" not in part and "value" not in part:
        raise data_error(source, f"{name} has no result; expected text or value, found {key_names(part)}", "type")
    if value is None and "" in (part.get("text"), part.get("value")):
        value = ""  # a result without a text, as opposed to null
    text = value if isinstance(value, str) else json_of(value, f"{name}.text", source)
    tool, call = _value(part, "name") or turn.name, _value(part, "tool_call_id") or turn.tool_call_id
    return Message("tool", text, name=tool, tool_call_id=call)


def _is_trained(turn: Record, role: Any, name: str, source: str) -> bool:
    """Return whether a turn is trained on: what its loss switches say, else True."""
    switches = {key: turn[key] for key in LOSS_KEYS if not is_null(turn.get(key))}
    for key, value in switches.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            actual = value if isinstance(value, int | float) else json_type(value)
            problem = f"{name}.{key} is {actual}; expected true or 1 (train on this turn), or false or 0 (only show it)"
            raise data_error(source, problem, "type")
    on, off = ([key for key, value in switches.items() if bool(value) is wanted] for wanted in (True, False))
    if on and off:
        raise data_error(source, f"{name}.{on[0]} and {name}.{off[0]} contradict each other; keep one of them")
    if on and isinstance(role, str) and role_of(role) != "assistant":
        problem = f"{name} asks to train on a turn of {role!r}; only assistant turns are trained on"
        raise data_error(source, problem, "roles")
    return not off


def convert_calls(value: Any, name: str, source: str) -> tuple[Record, ...]:
    """Return one call, a list of calls, or either as JSON, in the form that chat templates expect. Raises DataError."""
    value = parse_json(value, name, source)
    calls = value if isinstance(value, list) else [value]
    return tuple(_tool_call(call, f"{name}[{index}]", source) for index, call in enumerate(calls))


def _tool_call(call: Any, name: str, source: str) -> Record:
    function = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise data_error(source, f"{name} is not a tool call; expected an object with name and arguments", "tools")
    arguments = parse_json(one_of(function, ARGUMENT_KEYS, f"{name}.", source), f"{name}.arguments", source)
    if is_empty(arguments) or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        actual = "not a JSON object" if isinstance(arguments, str) else json_type(arguments)
        raise data_error(source, f"{name}.arguments is {actual}; expected an object: {{name: value}}", "tools")
    converted = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **converted} if not is_empty(call.get("id")) else converted


def _value(fields: Record, key: str) -> Any:
    return "" if is_empty(fields.get(key)) else fields[key]


def check_media(fields: Record, name: str, source: str) -> None:
    """Raises DataError for an object with images, audio or video; `name` precedes its keys in the message."""
    if media := next((key for key in MEDIA_KEYS if not is_empty(fields.get(key))), None):
        raise data_error(source, f"{name}{media} is not supported, since only text is trained on; remove it", "type")


def key_names(record: Record) -> str:
    """Return the keys of a record for a message, each at most 40 characters."""
    return ", ".join(key[:40] for key in record) or "none"


def is_null(value: Any) -> bool:
    """Return whether a value is null or NaN, as tables spell a missing value."""
    return value is None or value != value


def is_empty(value: Any) -> bool:
    """Return whether a value says as little as null: null, NaN, an empty text, list or object."""
    return is_null(value) or value in ("", [], {})


def one_of(fields: Record, keys: Sequence[str], name: str, source: str) -> Any:
    """Return the value of the keys that mean the same, None if all are empty.

    Raises DataError if two of them have different values; `name` precedes the keys in the message.
    """
    first = filled_key(fields, keys)
    other = next((key for key in keys if not is_empty(fields.get(key)) and fields[key] != fields[first]), None)
    if other:
        raise data_error(source, f"{name}{first} and {name}{other} contradict each other; keep one of them")
    return None if is_empty(fields.get(first)) else fields[first]


def filled_key(fields: Record, keys: Sequence[str]) -> str:
    """Return the first of the keys whose value is not empty, or else the first."""
    return next((key for key in keys if not is_empty(fields.get(key))), keys[0])


def parse_json(value: Any, name: str, source: str) -> Any:
    """Return what a text contains as JSON (lists in CSV cells, ShareGPT's tools, OpenAI's arguments), else `value`.

    Raises DataError for valid JSON that cannot be used (see json_text), with `name` in the message.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return loads(value.lstrip())
    except JsonProblem as problem:
        raise data_error(source, f"{name}: {problem}", "malformed") from problem
    except json.JSONDecodeError:
        return value
