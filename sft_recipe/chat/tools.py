"""Tools in requests, and the calls of tools in answers."""

import json
import re
from collections.abc import Collection
from typing import Any
from uuid import uuid4

from sft_recipe.evaluation.scores import find_tool_calls

# What templates put before a call: <tool_call>, [TOOL_CALLS] [, ```json
MARKER = re.compile(r"\s*(?:<[^<>\n]+>|\[\w+\]|```\w*)?\s*\[?\s*$")


def tool_name(tool: Any) -> str | None:
    """Return the name of the function that a tool describes, None where it describes none."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def split_tool_calls(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """Return the text before the first call of a tool with one of these names, and the calls as OpenAI writes them.

    Without a call this is the complete text. What follows the calls are the markers of the template; it is left out.
    """
    found = [(place, call) for place, call in find_tool_calls(text) if call[0] in names]
    if not found:
        return text, []
    calls = [
        {
            "id": f"call_{uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for _, (name, arguments) in found
    ]
    return MARKER.sub("", text[: found[0][0]]), calls
