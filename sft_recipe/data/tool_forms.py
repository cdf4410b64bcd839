"""Normalizes calls and results of tools: calls that a text spells as Hermes does, and results in another order."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from sft_recipe.data.messages import Conversation, Message, data_error
from sft_recipe.data.turns import Record, Turn, convert_calls, parse_json

# A call begins as JSON does: other models write <function=add> and add(a=2). In JSON, texts may have the tags in them.
# Each expression takes time in proportion to the text: a text of any length may come.
ENCLOSED = r'\{(?:"(?:[^"\\]|\\.)*+"|(?!</?tool_call>)[^"])*+|\{(?:(?!<tool_call>).)*?'
CALL = re.compile(rf"<tool_call>\s*({ENCLOSED})</tool_call>(?=\s*(?:<tool_call>|\Z))", re.DOTALL)
# A line that begins a call which nothing closes, or a list of calls at the end.
INSIDE = r"(?:(?!</?tool_call>).)*+"
UNUSABLE = re.compile(
    rf"^[ \t]*<tool_call>\s*(\{{\s*+[\"']{INSIDE}|\[\s*+\{{{INSIDE}(?:</tool_call>\s*)?)\Z", re.DOTALL | re.MULTILINE
)
CALL_FORM = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
RESULT, RESULT_END = "<tool_response>", "</tool_response>"
BETWEEN_RESULTS = re.compile(rf"{RESULT_END}\s*{RESULT}")


def with_hermes_calls(turns: list[Turn], source: str) -> list[Turn]:
    """Return the turns with the calls and results that are written in their texts as calls and results.

    assistant   I add.\\n<tool_call>\\n{"name": "add", "arguments": {"a": 2}}\\n</tool_call>   ->   I add. and a call
    tool        <tool_response>\\n4\\n</tool_response>                                        ->   4

    Tags in the middle of a text stay text. Raises DataError where they end it, but what they enclose is no call, and
    where a call is not closed.
    """
    return [converted for turn in turns for converted in _converted(turn, source)]


def _converted(turn: Turn, source: str) -> Iterator[Turn]:
    message = turn.message
    if not isinstance(message.content, str):
        yield turn
    elif message.role == "assistant" and not message.tool_calls:
        yield turn._replace(message=_with_calls(message, turn.field, source))
    else:
        yield from (turn._replace(message=result) for result in _without_tags(message))


def without_result_tags(conversation: Conversation) -> Conversation:
    """Return the conversation with the results of tools as `with_hermes_calls` returns them, for templates that write
    the tags themselves.
    """
    messages = tuple(part for message in conversation.messages for part in _without_tags(message))
    return conversation if messages == conversation.messages else replace(conversation, messages=messages)


def _without_tags(message: Message) -> list[Message]:
    """The results in a tool turn that consists of them, each a turn; else the message as it is."""
    text = message.content.strip()
    results = BETWEEN_RESULTS.split(text.removeprefix(RESULT).removesuffix(RESULT_END))
    is_wrapped = text.startswith(RESULT) and text.endswith(RESULT_END)
    if message.role != "tool" or not is_wrapped or any(RESULT in part or RESULT_END in part for part in results):
        return [message]
    return [replace(message, content=result.strip()) for result in results]


def _calls_at_end(text: str) -> tuple[str, list[str]]:
    """The text before the calls that end it, and these."""
    end, calls = len(text), list[str]()
    for match in reversed(list(CALL.finditer(text))):
        if text[match.end() : end].strip():
            break
        end = match.start()
        calls.insert(0, match[1].rstrip())
    return text[:end].rstrip() if calls else text, calls


def _with_calls(message: Message, field: str, source: str) -> Message:
    text, calls = _calls_at_end(message.content)
    if call := UNUSABLE.search(text):
        problem = (
            f"{field} has a <tool_call> that is not closed, or a list: {call[1].rstrip()[:80]!r}; write each call as "
        )
        raise data_error(source, problem + CALL_FORM, "tools")
    if not calls:
        return message
    converted: list[Record] = []
    for item in calls:
        call = parse_json(item, f"{field}, <tool_call>", source)
        if isinstance(call, str):
            problem = (
                f"{field} has a <tool_call> that is not JSON, which has double quotes, true, false and null: "
                f"{item[:80]!r}; expected {CALL_FORM}"
            )
            raise data_error(source, problem, "tools")
        converted += convert_calls(call, f"{field}, <tool_call>", source)
    return replace(message, content=text, tool_calls=tuple(converted))


def in_order_of_calls(turns: list[Turn]) -> list[Turn]:
    """Return the turns with the results of tools in the order of the calls, where their ids say which they answer.

    Most templates show results without ids, so that only their order says to which call they belong.
    """
    ordered: list[Turn] = []
    for is_result, group in groupby(turns, key=lambda turn: turn.message.role == "tool"):
        run = list(group)
        calls = ordered[-1].message.tool_calls if ordered else ()
        places = {call.get("id"): place for place, call in enumerate(calls) if isinstance(call.get("id"), str)}
        if is_result and all(turn.message.tool_call_id in [*places] for turn in run):
            run.sort(key=lambda turn: places[turn.message.tool_call_id])
        ordered += run
    return ordered
