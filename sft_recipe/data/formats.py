"""Records -> Conversation: one small reader for each format that people have, in a table."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

from sft_recipe.config.validation import nearest
from sft_recipe.data.messages import Conversation, Message, check_text, data_error, json_type
from sft_recipe.data.readers import BadRecord, read_records
from sft_recipe.data.sources import check_file
from sft_recipe.errors import ConfigError, DataError

Record = dict[str, Any]
Turn = tuple[str, Message]  # the field that the content stands in, and the turn

# Other names that data has for the roles. A call's content is the call itself, as JSON.
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
CALLS = ("function_call", "tool_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
# Names that data.columns may give to other columns: of records, and of the turns in them.
COLUMNS = ["messages", "conversations", "prompt", "response", "completion", "query", "instruction", "input", "output"]
COLUMNS += ["chosen", "system", "tools", "history"]
COLUMNS += ["role", "content", "from", "value", "reasoning_content", "tool_calls", "weight", "train"]


@dataclass(frozen=True)
class Format:
    """A record with all of `fields` is read by `turns(record, source)`. Conversation checks roles and contents."""

    fields: tuple[str, ...]
    turns: Callable[[Record, str], list[Turn]]


def _pair(prompt: str, response: str, record: Record, source: str) -> list[Turn]:
    """Two texts, or turns in place of either, after the pairs of texts that `history` holds."""
    return [
        *_history(record, source),
        *_side(record[prompt], "user", prompt, source),
        *_side(record[response], "assistant", response, source),
    ]


def _alpaca(record: Record, source: str, response: str = "output") -> list[Turn]:
    instruction = check_text(record["instruction"], "instruction", source)
    parts = [instruction, _optional_text(record, "input", source)]
    prompt = "\n\n".join(part for part in parts if part.strip())
    asked = ("instruction", Message("user", prompt))
    return [*_history(record, source), asked, *_side(record[response], "assistant", response, source)]


def _preference(record: Record, source: str) -> list[Turn]:
    """The chosen answer; it may come with all that leads to it."""
    before = next((field for field in ("messages", "conversations") if record.get(field)), None)
    if before:
        return [*_turn_list(before, record, source), *_side(record["chosen"], "assistant", "chosen", source)]
    if record.get("instruction"):
        return _alpaca(record, source, "chosen")
    chosen = _side(record["chosen"], "assistant", "chosen", source)
    prompt = _side(record["prompt"], "user", "prompt", source) if record.get("prompt") else []
    said = [turn for _, turn in prompt]
    if not prompt and not isinstance(record["chosen"], list):
        raise data_error(source, "chosen has no prompt beside it; expected prompt, messages or instruction")
    leads = [turn for _, turn in chosen[: len(said)]] == said  # such data often repeats the prompt there
    return [*_history(record, source), *([] if leads else prompt), *chosen]


def _history(record: Record, source: str) -> list[Turn]:
    turns: list[Turn] = []
    history = _from_json(record.get("history"))
    if history not in (None, "") and not isinstance(history, list):
        raise data_error(source, f"history is {json_type(history)}; expected a list of pairs of texts", "type")
    for index, pair in enumerate(history or []):
        name = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise data_error(source, f"{name} is no pair of texts: [what was asked, what was answered]", "type")
        turns += (f"{name}[0]", Message("user", pair[0])), (f"{name}[1]", Message("assistant", pair[1]))
    return turns


def _side(value: Any, role: str, field: str, source: str) -> list[Turn]:
    """A text of that role, one turn, or a list of turns."""
    if isinstance(value, list):
        return _turn_list(field, {field: value}, source)
    if isinstance(value, dict):
        return _turns(value, field, source)
    return [(field, Message(role, value))]


def _turn_list(field: str, record: Record, source: str) -> list[Turn]:
    turns = _from_json(record[field])  # a CSV cell holds a list as JSON
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else json_type(turns)
        raise data_error(source, f"{field} is {found}; expected a list of turns with role and content", "type")
    return [turn for index, item in enumerate(turns) for turn in _turns(item, f"{field}[{index}]", source)]


def _turns(turn: Any, name: str, source: str) -> list[Turn]:
    """What one item of a list says: one turn, or several where results of tools stand in a user's turn."""
    if not isinstance(turn, dict):
        raise data_error(source, f"{name} is {json_type(turn)}; expected an object with role and content", "type")
    keys = ["from", "value"] if "role" not in turn and "from" in turn else ["role", "content"]
    calls = _first(turn, ("tool_calls", "function_call"))
    for key in keys:
        if key not in turn and not (key == "content" and calls):
            problem = f"{name}.{key} is missing; expected {' and '.join(keys)}, found {_names(turn)}"
            raise data_error(source, problem)
    role, content = turn[keys[0]], turn.get(keys[1])
    field = f"{name}.{keys[1]}"
    train = _train(turn, role, name, source)
    if isinstance(role, str) and role in CALLS:
        return [(field, Message("assistant", "", tool_calls=_tool_calls(content, field, source), train=train))]
    if isinstance(role, str):
        role = ROLE_NAMES.get(role, role)
    if isinstance(content, list):
        return [(field, part) for part in _parts(content, role, train, field, source)]
    text: Any = "" if content is None and calls else content
    message = Message(
        role,
        text,
        reasoning=_first(turn, REASONING) or "",
        tool_calls=_tool_calls(calls, f"{name}.tool_calls", source) if calls else (),
        name=turn.get("name") or "" if role == "tool" else "",
        tool_call_id=turn.get("tool_call_id") or "",
        train=train,
    )
    return [(field, message)]


def _parts(parts: list[Any], role: str, train: bool, field: str, source: str) -> list[Message]:
    """A content of typed parts: {"type": "text", "text": ...}; templates show thought, text and calls in this order."""
    found: dict[str, Any] = {"reasoning": [], "text": [], "tool_call": []}
    messages: list[Message] = []
    for index, part in enumerate(parts):
        name = f"{field}[{index}]"
        if not isinstance(part, dict) or "type" not in part:
            raise data_error(
                source, f"{name} is {json_type(part)}; expected an object with type, and text or value", "type"
            )
        kind = part["type"]
        value = _first(part, ("text", "value"))
        if kind == "tool_result":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            name, call = part.get("name") or "", part.get("tool_call_id") or ""
            messages.append(Message("tool", text, name=name, tool_call_id=call))
        elif kind not in found:
            raise data_error(source, f"{name}.type is {kind!r}; expected {', '.join(found)} or tool_result", "type")
        elif any(later and found[later] for later in list(found)[list(found).index(kind) + 1 :]):
            raise data_error(
                source, f"{name} is a {kind} part after a later kind; expected {', '.join(found)} in order"
            )
        elif kind == "tool_call":
            found[kind] += _tool_calls(value, name, source)
        else:
            found[kind].append(check_text(value, f"{name}.text", source))
    reasoning, text = "".join(found["reasoning"]), "".join(found["text"])
    if text or reasoning or found["tool_call"] or not messages:
        messages.append(Message(role, text, reasoning, tuple(found["tool_call"]), train=train))
    return messages


def _train(turn: Record, role: Any, name: str, source: str) -> bool:
    """Whether a turn is learnt: `train` (true, false) or `weight` (1, 0), where given."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise data_error(source, f"{name}.train is {json_type(train)}; expected true or false", "type")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        found = weight if isinstance(weight, int | float) else json_type(weight)
        raise data_error(source, f"{name}.weight is {found}; expected 1 (learn this turn) or 0 (only show it)", "type")
    if train is not None and weight is not None and train != bool(weight):
        raise data_error(source, f"{name}.train and {name}.weight contradict each other; keep one of them")
    wanted = train if train is not None else None if weight is None else bool(weight)
    is_assistant = role in CALLS or ROLE_NAMES.get(role, role) == "assistant" if isinstance(role, str) else True
    if wanted and not is_assistant:
        raise data_error(
            source, f"{name} asks to learn a turn of {role!r}; only an assistant's turns are learnt", "roles"
        )
    return wanted is not False


def _tool_calls(value: Any, name: str, source: str) -> tuple[Record, ...]:
    """One call, a list of them, or either as JSON, in the form that chat templates want; arguments become an object."""
    value = _from_json(value)
    calls = value if isinstance(value, list) else [value]
    return tuple(_tool_call(call, f"{name}[{index}]", source) for index, call in enumerate(calls))


def _tool_call(call: Any, name: str, source: str) -> Record:
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise data_error(source, f"{name} is no call of a tool; expected an object with name and arguments", "tools")
    arguments = inner.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _from_json(arguments)
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        found = "no JSON object" if isinstance(arguments, str) else json_type(arguments)
        raise data_error(source, f"{name}.arguments is {found}; expected an object: {{name: value}}", "tools")
    whole = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return {"id": call["id"], **whole} if call.get("id") else whole


def _tools(record: Record, source: str) -> tuple[Record, ...]:
    """The schemas, each as {"type": "function", "function": {...}}; what is inside stays as it is."""
    tools = _from_json(record.get("tools"))
    if tools in (None, "", [], {}):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise data_error(
            source, f"tools is {json_type(tools)}; expected a list of function schemas, or that as JSON", "tools"
        )
    return tuple(
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    )


# The first that fits wins: a list of turns holds more than a prompt that stands beside it.
FORMATS = {
    "preference": Format(("chosen",), _preference),
    "messages": Format(("messages",), partial(_turn_list, "messages")),
    "conversations": Format(("conversations",), partial(_turn_list, "conversations")),
    "prompt_response": Format(("prompt", "response"), partial(_pair, "prompt", "response")),
    "prompt_completion": Format(("prompt", "completion"), partial(_pair, "prompt", "completion")),
    "query_response": Format(("query", "response"), partial(_pair, "query", "response")),
    "alpaca": Format(("instruction", "output"), _alpaca),
}


class Columns:
    """Names that the data has for ours (`{"response": "answer"}`), and which of them have been met.

    Raises ConfigError for a name that is none of COLUMNS.
    """

    def __init__(self, theirs: Mapping[str, str] | None = None):
        self.theirs = dict(theirs or {})
        self.unmet = set(self.theirs)
        for ours in self.theirs:
            if ours not in COLUMNS:
                raise ConfigError(f"data.columns names {ours!r}, which no format has.{nearest(ours, COLUMNS)}")

    def rename(self, value: Any) -> Any:
        """A record under our names, the turns in its lists included."""
        if not self.theirs or not isinstance(value, dict):
            return value
        renamed = dict(value)
        for ours, theirs in self.theirs.items():
            if theirs in value:
                self.unmet.discard(ours)
                renamed.pop(theirs, None)
                renamed[ours] = value[theirs]
        for field in ("messages", "conversations", "prompt", "chosen"):
            turns = _from_json(renamed.get(field))
            if isinstance(turns, list):
                renamed[field] = [self.rename(turn) for turn in turns]
        return renamed

    def check_all_found(self) -> None:
        """Raises DataError where a column was named that no record has."""
        if self.unmet:
            missing = ", ".join(f"{ours} is to be {self.theirs[ours]!r}" for ours in sorted(self.unmet))
            raise DataError(f"data.columns: {missing}, which no record has; look at the names in the data.")


def read_conversations(path: str | Path, format: str = "auto") -> Iterator[Conversation]:
    """Read a data file (see containers.CONTAINERS) whose records are in any of FORMATS, or in the one named.

    Raises DataError: at once for an unknown format or a file that cannot be used; while reading for a damaged
    or empty file and for the first bad record, naming file, record or line, field, and what was expected.
    """
    return _raising(read_data(path, format))


def _raising(items: Iterator[Conversation | BadRecord]) -> Iterator[Conversation]:
    for item in items:
        if isinstance(item, BadRecord):
            raise item.error
        yield item


def read_data(
    path: str | Path, format: str = "auto", columns: Columns | None = None
) -> Iterator[Conversation | BadRecord]:
    """As `read_conversations`, but a record that cannot be used comes as Rejected, and reading goes on."""
    if format != "auto" and format not in FORMATS:
        raise DataError(f"Unknown data format '{format}'; known are auto, {', '.join(FORMATS)}.")
    check_file(Path(path))
    formats = FORMATS if format == "auto" else {format: FORMATS[format]}
    return _conversations(Path(path), formats, columns or Columns())


def _conversations(path: Path, formats: Mapping[str, Format], columns: Columns) -> Iterator[Conversation | BadRecord]:
    empty = True
    for place, record in read_records(path):
        empty = False
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            yield to_conversation(columns.rename(record), f"{path}, {place}", formats)
        except DataError as error:
            yield BadRecord(error, record)
    if empty:
        raise data_error(str(path), "no records; expected at least one (in CSV, below a header line)", "empty")


def to_conversation(record: Any, source: str, formats: Mapping[str, Format] = FORMATS) -> Conversation:
    """Raises DataError where the record fits none of the formats, or cannot be trained on."""
    if not isinstance(record, dict):
        raise data_error(source, f"the record is {json_type(record)}; expected an object with named fields", "type")
    turns = _recognise(record, source, formats).turns(record, source)
    if record.get("history") and not any(field.startswith("history") for field, _ in turns):
        raise data_error(source, "history stands beside a list of turns, which holds them all; put its turns there")
    if record.get("functions"):
        raise data_error(source, "functions is not read; write the schemas as tools", "tools")
    system = _optional_text(record, "system", source)
    if system.strip():
        turns.insert(0, ("system", Message("system", system)))
    messages = tuple(message for _, message in turns)
    return Conversation(messages, source, _tools(record, source), fields=[field for field, _ in turns])


def _recognise(record: Record, source: str, formats: Mapping[str, Format]) -> Format:
    """Filled fields count first: in a table of mixed formats, a row has null in the columns of the others."""
    filled = {key for key, value in record.items() if value is not None}
    for keys in (filled, record.keys()):
        for format in formats.values():
            if keys >= set(format.fields):
                return format
    if filled & {"text", "content"} and len(formats) > 1:
        field = "text" if "text" in filled else "content"
        problem = (
            f"the record is one text ({field}), in which nothing says what was asked and what is to be learnt; "
            "write prompt and response, or messages"
        )
        raise data_error(source, problem)
    known = " or ".join(f"{name} ({', '.join(format.fields)})" for name, format in formats.items())
    missing = [field for format in formats.values() for field in format.fields if field not in record]
    hint = _hint(missing, record)
    other = "" if hint else "; data.columns gives other names to columns"
    raise data_error(source, f"the fields ({_names(record)}) fit no format{hint}; expected {known}{other}")


def _names(holder: Record) -> str:
    return ", ".join(key[:40] for key in holder) or "none"


def _hint(wanted: Iterable[str], found: Iterable[str]) -> str:
    """A question about the likeliest slip of the pen, else nothing."""
    pairs = [(has, name) for has in found for name in wanted]
    ratios = [(SequenceMatcher(None, has.lower(), name).ratio(), has, name) for has, name in pairs]
    ratio, has, name = max(ratios, default=(0.0, "", ""))
    return f" (is '{has}' meant to be '{name}'?)" if ratio > 0.8 else ""


def _optional_text(record: Record, field: str, source: str) -> str:
    value = record.get(field)
    return "" if value is None else check_text(value, field, source)


def _first(holder: Record, keys: Iterable[str]) -> Any:
    """The value of the first key that is filled."""
    return next((holder[key] for key in keys if holder.get(key) not in (None, "", [], {})), None)


def _from_json(value: Any) -> Any:
    """What a text holds as JSON, where it does: lists in CSV cells, ShareGPT's tools, OpenAI's arguments."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
