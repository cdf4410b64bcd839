"""Defines Message and Conversation: every data format is converted to these validated types."""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from sft_recipe.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# Reasoning written into the content itself, at its start.
THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)", re.DOTALL)
JSON_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
JSON_TYPES |= {str: "text", list: "a list", dict: "an object"}
CUT_TEXT = "text beyond max_chars"  # in `unread` of a conversation
# How files in other encodings of Unicode begin; UTF-32 first, since the mark of UTF-16 is the begin of its mark.
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Message:
    """A Message is one turn of a conversation; every text is kept exactly as given.

    An assistant turn may have `reasoning` and `tool_calls`: `{"type": "function", "function": {"name", "arguments"}}`
    with the arguments as an object, and optionally an `id`. A tool turn may name the tool and the call it answers,
    other turns who speaks. `train` is False for an assistant turn that the model sees but is not trained on.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    train: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as chat templates expect it; fields that the turn does not have are left out."""
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
    """A Conversation has been checked and can be trained on. `source` is where it was read (`a.json, record 12`).

    `tools` are the schemas of the functions that may be called, unchanged. `fields` has the name of the record's field
    that held each turn's content, for error messages: `prompt`, `conversations[3].content`. `unread` are keys of the
    record that are not read. `chat_template_kwargs` are variables for the chat template. Two conversations are equal
    when their messages, tools and variables are equal.

    Raises DataError for an unknown role, content that is not text, an empty prompt or response, reasoning or tool
    calls outside an assistant turn, reasoning given twice, two system turns in a row, and no assistant turn.
    """

    messages: tuple[Message, ...]
    source: str = field(default="", compare=False)
    tools: tuple[dict[str, Any], ...] = ()
    unread: tuple[str, ...] = field(default=(), compare=False)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    fields: InitVar[Sequence[str]] = ()

    def __post_init__(self, fields: Sequence[str]) -> None:
        fields = fields or [f"messages[{index}].content" for index in range(len(self.messages))]
        roles = [message.role for message in self.messages]
        for index, (message, name) in enumerate(zip(self.messages, fields, strict=True)):
            turn = name[: name.rfind(".") + 1]
            _check_role(roles, index, turn + "role", self.source)
            _check_content(message, name, self.source)
            _check_extras(message, name, turn, self.source)
        json_of(self.tools, "tools", self.source)
        json_of(self.chat_template_kwargs, "chat_template_kwargs", self.source)
        if "assistant" not in roles:
            name = fields[-1].partition("[")[0] if fields else "messages"
            problem = f"{name} has no assistant turn, so there is nothing to train on; add one"
            raise data_error(self.source, problem, "roles")

    @property
    def size(self) -> int:
        """Return the number of characters in all contents."""
        return sum(len(message.content) + len(message.reasoning) for message in self.messages)

    def cut(self, max_chars: int) -> "Conversation":
        """Return the conversation with each content cut to so many characters; raises DataError for one left empty."""
        messages = tuple(replace(message, content=message.content[:max_chars]) for message in self.messages)
        is_cut = messages != self.messages
        return replace(self, messages=messages, unread=(*self.unread, *([CUT_TEXT] if is_cut else [])), fields=())

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the turns as chat templates expect them."""
        return [message.as_dict() for message in self.messages]

    def as_record(self) -> dict[str, Any]:
        """Return the conversation as a record of the format `messages`."""
        flags = [{} if message.train else {"train": False} for message in self.messages]
        turns = [turn | flag for turn, flag in zip(self.as_dicts(), flags, strict=True)]
        others = {"tools": list(self.tools), "chat_template_kwargs": self.chat_template_kwargs}
        return {"messages": turns, **{key: value for key, value in others.items() if value}}


def data_error(source: str, problem: str, kind: str = "fields") -> DataError:
    """Return a DataError whose message begins with `source`, where the bad value is, unless that is unknown."""
    return DataError(f"{source}: {problem}." if source else f"{problem}.", kind)


def not_utf8(start: bytes) -> str:
    """Return the problem of a text that is not UTF-8, with the remedy for the encoding that its start shows."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if encoding:
        return f"{encoding}, not UTF-8; save the file as UTF-8 (`iconv -f {encoding} -t UTF-8` converts it)"
    return "not UTF-8; save the file as UTF-8 (`iconv -f GBK -t UTF-8` converts that of Chinese Windows)"


def json_type(value: object) -> str:
    """Return the JSON type of a value, in words for a message."""
    return JSON_TYPES.get(type(value), type(value).__name__)


def check_text(value: object, name: str, source: str) -> str:
    """Return `value` if it is text that can be encoded as UTF-8; raises DataError if not."""
    if not isinstance(value, str):
        raise data_error(source, f"{name} is {json_type(value)}; expected text", "type")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud83d"
        half = f"\\u{ord(value[error.start]):04x}"
        raise data_error(
            source, f"{name} contains {half}, half of a character; write the complete character", "type"
        ) from error
    return value


def json_of(value: object, name: str, source: str) -> str:
    """Return a value as JSON. Raises DataError for what JSON does not have, such as dates, and half a character."""

    def refuse(found: object) -> None:
        problem = f"{name} has a value of type {type(found).__name__}, which JSON does not have; write it as text"
        raise data_error(source, problem, "type")

    try:
        return check_text(json.dumps(value, ensure_ascii=False, allow_nan=False, default=refuse), name, source)
    except ValueError as error:
        problem = f"{name} has a number that JSON does not have: NaN, or one too large (Infinity, 1e999)"
        raise data_error(source, f"{problem}; write another number, or text", "type") from error


def _check_role(roles: Sequence[str], index: int, name: str, source: str) -> None:
    role = roles[index]
    if role not in ROLES:
        found = repr(role) if isinstance(role, str) else json_type(role)
        expected = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}; data.roles maps other names"
        raise data_error(source, f"{name} is {found}; expected {expected}", "roles")
    if role == "system" and roles[index - 1 : index] == ["system"]:
        raise data_error(source, f"{name} is a second system turn in a row; keep one of them", "roles")


def _check_content(message: Message, name: str, source: str) -> None:
    content = check_text(message.content, name, source)
    may_be_empty = message.role in ("system", "tool") or message.tool_calls or message.reasoning
    if not may_be_empty and not content.strip():
        what = "response" if message.role == "assistant" else "prompt"
        raise data_error(source, f"{name} is an empty {what}; fill it in or remove the record", "empty")


def _check_extras(message: Message, name: str, turn: str, source: str) -> None:
    for key, value in (("name", message.name), ("tool_call_id", message.tool_call_id)):
        if value:
            check_text(value, turn + key, source)
    if not message.reasoning and not message.tool_calls:
        return
    if message.role != "assistant":
        what = "tool_calls" if message.tool_calls else "reasoning"
        problem = f"{turn}role is {message.role}, but there is {what}; only assistant turns may have it"
        raise data_error(source, problem, "roles")
    check_text(message.reasoning, f"{turn}reasoning_content", source)
    if message.reasoning and THOUGHT.match(message.content):
        problem = f"{name} begins with a <think> although there is {turn}reasoning_content; keep one"
        raise data_error(source, problem)
    if message.tool_calls:
        json_of(message.tool_calls, f"{turn}tool_calls", source)
