"""Message and Conversation: the one validated shape that every data format is turned into."""

import json
import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from sft_recipe.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# A thought written into the content itself, at its start.
THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)", re.DOTALL)
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
KINDS |= {str: "text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Message:
    """One turn; every text is kept exactly as given.

    An assistant may think (`reasoning`) and call tools: `{"type": "function", "function": {"name", "arguments"}}`
    with the arguments as an object, and perhaps an `id`. A tool's turn may name it and the call that it answers.
    `train` is False for an assistant's turn that is shown to the model and not learnt.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    train: bool = True

    def as_dict(self) -> dict[str, Any]:
        """As chat templates want it: what a turn lacks is no key of it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        if self.tool_calls:
            turn["tool_calls"] = list(self.tool_calls)
        if self.name:
            turn["name"] = self.name
        if self.tool_call_id:
            turn["tool_call_id"] = self.tool_call_id
        return turn


@dataclass(frozen=True)
class Conversation:
    """A conversation that can be trained on. `source` says where it came from (`a.json, record 12`).

    `tools` are the schemas of the functions that may be called, untouched. `fields` names the field of the record
    that each turn's content stood in, for error messages: `prompt`, `conversations[3].content`. Two conversations
    are equal when their messages and tools are.

    Raises DataError for an unknown role, content that is no text, an empty prompt or response, reasoning or tool
    calls of anyone but the assistant, a thought in two places, a system turn that is not the first, no assistant turn.
    """

    messages: tuple[Message, ...]
    source: str = field(default="", compare=False)
    tools: tuple[dict[str, Any], ...] = ()
    fields: InitVar[Sequence[str]] = ()

    def __post_init__(self, fields: Sequence[str]) -> None:
        fields = fields or [f"messages[{index}].content" for index in range(len(self.messages))]
        roles = [message.role for message in self.messages]
        for index, (message, name) in enumerate(zip(self.messages, fields, strict=True)):
            turn = name.removesuffix("content").removesuffix("value")
            _check_role(roles, index, turn + "role", self.source)
            _check_content(message, name, self.source)
            _check_extras(message, turn, self.source)
        if self.tools:
            _check_json(self.tools, "tools", self.source)
        if "assistant" not in roles:
            name = fields[-1].partition("[")[0] if fields else "messages"
            problem = f"{name} has no assistant turn, so there is nothing to learn; add one"
            raise data_error(self.source, problem, "roles")

    def as_dicts(self) -> list[dict[str, Any]]:
        """The turns as chat templates want them."""
        return [message.as_dict() for message in self.messages]

    def as_record(self) -> dict[str, Any]:
        """As a record of the format `messages`."""
        learnt = [{} if message.train else {"train": False} for message in self.messages]
        turns = [turn | more for turn, more in zip(self.as_dicts(), learnt, strict=True)]
        return {"messages": turns, "tools": list(self.tools)} if self.tools else {"messages": turns}


def data_error(source: str, problem: str, kind: str = "fields") -> DataError:
    """A DataError (to raise) that begins with the place, where it is known."""
    return DataError(f"{source}: {problem}." if source else f"{problem}.", kind)


def json_type(value: object) -> str:
    """What a value of a record is, in a user's words."""
    return KINDS.get(type(value), type(value).__name__)


def check_text(value: object, name: str, source: str) -> str:
    """The value itself if it is text that can be tokenised; raises DataError if not."""
    if not isinstance(value, str):
        raise data_error(source, f"{name} is {json_type(value)}; expected text", "type")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud83d"
        half = f"\\u{ord(value[error.start]):04x}"
        raise data_error(source, f"{name} holds {half}, half of a character; write the whole one", "type") from error
    return value


def _check_json(value: object, name: str, source: str) -> None:
    check_text(json.dumps(value, ensure_ascii=False), name, source)


def _check_role(roles: Sequence[str], index: int, name: str, source: str) -> None:
    role = roles[index]
    if role not in ROLES:
        found = repr(role) if isinstance(role, str) else json_type(role)
        raise data_error(source, f"{name} is {found}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}", "roles")
    if role == "system" and "system" in roles[:index]:
        raise data_error(source, f"{name} makes a second system turn; keep one, as the first turn", "roles")
    if role == "system" and index > 0:
        raise data_error(source, f"{name} is a system turn after other turns; move it to the front", "roles")


def _check_content(message: Message, name: str, source: str) -> None:
    content = check_text(message.content, name, source)
    may_be_empty = message.role in ("system", "tool") or message.tool_calls
    if not may_be_empty and not content.strip():
        what = "response" if message.role == "assistant" else "prompt"
        raise data_error(source, f"{name} is an empty {what}; fill it in or remove the record", "empty")


def _check_extras(message: Message, turn: str, source: str) -> None:
    for name, value in (("name", message.name), ("tool_call_id", message.tool_call_id)):
        if value:
            check_text(value, turn + name, source)
    if not message.reasoning and not message.tool_calls:
        return
    if message.role != "assistant":
        what = "tool_calls" if message.tool_calls else "reasoning"
        raise data_error(source, f"{turn}role is {message.role}, which has no {what}; only an assistant has", "roles")
    check_text(message.reasoning, f"{turn}reasoning_content", source)
    if message.reasoning and THOUGHT.match(message.content):
        problem = f"{turn}content begins with a <think> beside {turn}reasoning_content; keep the thought in one place"
        raise data_error(source, problem)
    if message.tool_calls:
        _check_json(message.tool_calls, f"{turn}tool_calls", source)
