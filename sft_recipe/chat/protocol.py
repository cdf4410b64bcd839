"""The OpenAI protocol: requests become messages and sampling options; answers and errors become its objects."""

import difflib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sft_recipe.chat.model import Reply
from sft_recipe.chat.sampling import LIMITS, Sampling
from sft_recipe.chat.text_stream import Piece
from sft_recipe.chat.tools import split_tool_calls, tool_name
from sft_recipe.data.messages import json_type
from sft_recipe.data.turns import convert_calls
from sft_recipe.errors import ConfigError, DataError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# Parameters without effect, with the values that mean so; other values are errors.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
OPTIONS = {*LIMITS, "stop"} - {"max_new_tokens"} | {*OTHER_NAMES}
OTHERS = {"model", "messages", "stream", "stream_options", "chat_template_kwargs", "tools"}
KNOWN = {*OTHERS, *OPTIONS, *NEUTRAL, *IGNORED}
TEXTS = ("content", "reasoning_content", "name", "tool_call_id")  # of a message


class ApiError(Exception):
    """A request is refused: `status` is that of HTTP, `param` the parameter, `code` a name for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return the error as an object of the protocol."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(str(self)), "type": kind, "param": param, "code": self.code}}


def _encodable(text: str) -> str:
    """Write halves of characters, which JSON can contain and UTF-8 cannot, as escapes."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class ChatRequest:
    """A ChatRequest has been checked; `options` are those of Sampling that it gives, `tools` what may be called."""

    model: str
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    template_variables: dict[str, Any]
    stream: bool
    include_usage: bool
    tools: list[dict[str, Any]]


def parse_request(body: bytes) -> ChatRequest:
    """Return the request in a body. Raises ApiError for what is invalid, unknown or not supported."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is {json_type(content)}; expected an object")
    given = {name: value for name, value in content.items() if value is not None}
    for name, value in given.items():
        _check_parameter(name, value)
    stream_options = _typed(given, "stream_options", dict, {})
    return ChatRequest(
        _typed(given, "model", str),
        _messages(_typed(given, "messages", list)),
        _options(given),
        _typed(given, "chat_template_kwargs", dict, {}),
        _typed(given, "stream", bool, False),
        _typed(stream_options, "include_usage", bool, False),
        _tools(given),
    )


def _check_parameter(name: str, value: Any) -> None:
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ApiError(400, f"unknown parameter {name}{hint}", name, "unknown_parameter")
    if name in NEUTRAL and value not in NEUTRAL[name]:
        raise ApiError(400, f"{name}={json.dumps(value)[:80]} is not supported", name, "unsupported_parameter")


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    if name not in given and default is None:
        raise ApiError(400, f"{name} is missing", name)
    value = given.get(name, default)
    if not isinstance(value, kind):
        expected = {str: "text", list: "a list", dict: "an object", bool: "true or false"}[kind]
        raise ApiError(400, f"{name} is {json_type(value)}; expected {expected}", name)
    return value


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    limits = {name: given[name] for name in OTHER_NAMES if given.get(name) is not None}
    if len({*map(repr, limits.values())}) > 1:
        raise ApiError(400, f"{' and '.join(limits)} are the same limit and differ; give one of them", [*limits][0])
    for name in OPTIONS & given.keys():
        option = OTHER_NAMES.get(name, name)
        try:
            Sampling().updated({option: given[name]})
        except ConfigError as error:
            raise ApiError(400, str(error).replace(option, name, 1), name) from None
    return {OTHER_NAMES.get(name, name): given[name] for name in OPTIONS & given.keys()}


def _tools(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = _typed(given, "tools", list, [])
    if (wrong := next((index for index, tool in enumerate(tools) if tool_name(tool) is None), None)) is not None:
        where = f"tools[{wrong}]"
        form = '{"type": "function", "function": {"name": "...", ...}}'
        raise ApiError(400, f"{where} is no function; expected {form}", where)
    return [] if given.get("tool_choice") == "none" else tools


def _messages(messages: list[Any]) -> list[dict[str, Any]]:
    if not messages:
        raise ApiError(400, "messages is empty", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} is {json_type(message)}; expected an object", where)
    given = {name: value for name, value in message.items() if value is not None}
    role = given.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}.role is {role!r}; expected {', '.join(ROLES)}", f"{where}.role")
    calls = _calls(given.pop("tool_calls", None), f"{where}.tool_calls") if role == "assistant" else {}
    if unknown := next((name for name in given if name not in TEXTS and given[name]), None):
        raise ApiError(400, f"{where}.{unknown} is not supported", f"{where}.{unknown}")
    if "content" not in given and not calls:
        raise ApiError(400, f"{where}.content is missing", f"{where}.content")
    texts = {name: _text(given[name], f"{where}.{name}") for name in TEXTS if name in given}
    return {"role": ROLES[role], "content": "", **texts, **calls}


def _calls(value: Any, where: str) -> dict[str, Any]:
    """The tool calls of an earlier answer, with their arguments as objects, as in training."""
    if not value:
        return {}
    try:
        return {"tool_calls": list(convert_calls(value, where, ""))}
    except DataError as error:
        raise ApiError(400, str(error), where) from None


def _text(value: Any, where: str) -> str:
    """The text of a content, which may also be a list of parts."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ApiError(400, f"{where} is {json_type(value)}; expected text", where)
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise ApiError(400, f"{where} has a part that is not text, which this model does not read", where)
    return "".join(part["text"] for part in parts)


class Answer:
    """Makes the objects of one answer, which may call `tools`: a completion, or the chunks of a stream."""

    def __init__(self, model: str, tools: Iterable[dict[str, Any]] = ()):
        self._tools = {tool_name(tool) or "" for tool in tools}
        self._common = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}

    def completion(self, reply: Reply) -> dict[str, Any]:
        """Return the complete answer."""
        reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        content, reason = self._content(reply)
        message = {"role": "assistant", **content, **reasoning}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return self._common | {"object": "chat.completion", "choices": [choice], "usage": _usage(reply)}

    def first_chunk(self) -> dict[str, Any]:
        """Return the chunk that begins a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunk of a piece, none where it may be a part of a tool call, which comes at the end."""
        if piece.kind == "answer" and self._tools:
            return []
        return [self._chunk({"content" if piece.kind == "answer" else "reasoning_content": piece.text})]

    def last_chunks(self, reply: Reply, include_usage: bool) -> list[dict[str, Any]]:
        """Return the chunks that end a stream: why it ended, and the numbers of tokens if they were asked for."""
        content, reason = self._content(reply)
        for index, call in enumerate(content.get("tool_calls", ())):
            call["index"] = index
        chunks = [self._chunk(content)] if self._tools else []
        chunks.append(self._chunk({}, reason))
        return [*chunks, self._chunk() | {"usage": _usage(reply)}] if include_usage else chunks

    def _content(self, reply: Reply) -> tuple[dict[str, Any], str]:
        """The text and the tool calls of an answer, and why it ended."""
        reason = "length" if reply.finish_reason == "length" else "stop"
        text, calls = split_tool_calls(reply.content, self._tools)
        return ({"content": text or None, "tool_calls": calls}, "tool_calls") if calls else ({"content": text}, reason)

    def _chunk(self, delta: dict[str, Any] | None = None, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._common | {"object": "chat.completion.chunk", "choices": [] if delta is None else [choice]}


def _usage(reply: Reply) -> dict[str, int]:
    total = reply.prompt_tokens + reply.completion_tokens
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": total,
    }
