"""Rewrites the parts of a content that other APIs name differently, such as Anthropic's, as parts of our formats."""

from typing import Any

from sft_recipe.data.messages import check_text, data_error, json_type

Record = dict[str, Any]


def normalized_part(part: Record, name: str, source: str) -> Record:
    """Return a part as `text`, `reasoning`, `tool_call` or `tool_result`; a part of another type is returned unchanged.

    {"type": "thinking", "thinking": "Add."}                          {"type": "reasoning", "text": "Add."}
    {"type": "tool_use", "id": "c1", "name": "add", "input": {}}      a call, {"type": "tool_call", "value": ...}
    {"type": "tool_result", "tool_use_id": "c1", "content": "4"}      its result, {"type": "tool_result", ...}

    Raises DataError for a result that is neither text nor a list of text parts.
    """
    kind = part.get("type")
    if kind == "thinking":
        return {"type": "reasoning", "text": part.get("thinking")}
    if kind == "tool_use":
        call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
        return {"type": "tool_call", "value": call}
    if kind == "tool_result" and {"content", "tool_use_id"} & part.keys():
        content = part.get("content")
        text = "" if content is None else joined_text(content, f"{name}.content", source)
        return {"type": kind, "value": text, "name": part.get("name"), "tool_call_id": part.get("tool_use_id")}
    return part


def joined_text(value: Any, name: str, source: str) -> str:
    """Return a text, or the joined texts of a list of text parts. Raises DataError for anything else."""
    if not isinstance(value, list):
        return check_text(value, name, source)
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else json_type(part)
            raise data_error(source, f"{name}[{index}] is {kind}; expected a text part", "type")
    return "".join(check_text(part.get("text"), f"{name}[{index}].text", source) for index, part in enumerate(value))
