"""Converts records of all formats to Conversations or token ids: one small function per format, in the table FORMATS.

To add a format, write a function that returns the turns of a record, and add a line to FORMATS (and its name to
`data.format` in config/schema.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

from sft_recipe.config.reserved import NOT_TEMPLATE_VARIABLES
from sft_recipe.data.content_parts import joined_text
from sft_recipe.data.messages import Conversation, Message, check_text, data_error, json_type
from sft_recipe.data.pretokenized import TokenizedRecord, tokenized_record
from sft_recipe.data.readers import BadRecord, read_records
from sft_recipe.data.tool_forms import in_order_of_calls, with_hermes_calls
from sft_recipe.data.turns import (
    REASONING_KEYS,
    TOOL_KEYS,
    Record,
    Turn,
    check_media,
    filled_key,
    is_empty,
    is_null,
    key_names,
    one_of,
    parse_json,
    turn_list,
    turns_of,
)
from sft_recipe.data.unread import unread_keys
from sft_recipe.errors import DataError

SYSTEM_KEYS = ("system", "system_prompt")
TEMPLATE_KEY = "chat_template_kwargs"


@dataclass(frozen=True)
class Format:
    """A Format applies to records that have all `fields`; `turns(record, source)` returns their turns.

    Roles and contents are checked later, by Conversation. `ignored` are fields that are not trained on by design.
    """

    fields: tuple[str, ...]
    turns: Callable[[Record, str], list[Turn]]
    ignored: tuple[str, ...] = ()


def read_conversations(path: str | Path, format: str = "auto") -> Iterator[Conversation]:
    """Return an iterator over the conversations of a data file (see READERS) in the named format or any of FORMATS.

    Raises DataError: at once for an unknown format or a file that cannot be used; while reading for a damaged
    or empty file and for the first bad record. The message has the file, the record or line, the field, and what was
    expected.
    """
    formats = select_formats(format)
    return (_valid_conversation(record, location, formats) for location, record in read_records(Path(path)))


def _valid_conversation(record: Any, location: str, formats: Mapping[str, Format]) -> Conversation:
    if isinstance(record, BadRecord):
        raise record.error
    return to_conversation(record, location, formats)


def select_formats(format: str) -> Mapping[str, Format]:
    """Return all formats for "auto", else the one with this name. Raises DataError for an unknown name."""
    if format == "auto":
        return FORMATS
    if format not in FORMATS:
        raise DataError(f"Unknown data format '{format}'; expected auto, {', '.join(FORMATS)}.")
    return {format: FORMATS[format]}


def to_conversation(record: Any, source: str, formats: Mapping[str, Format] | None = None) -> Conversation:
    """Return the conversation in a record; `formats` are those it may have (default: FORMATS).

    Raises DataError, beginning with `source`, for a record of no known format or one that cannot be trained on, and
    for one that holds token ids.
    """
    converted = convert(record, source, formats)
    if isinstance(converted, TokenizedRecord):
        raise data_error(source, "the record holds token ids (input_ids), not a conversation; only training reads it")
    return converted


def convert(
    record: Any, source: str, formats: Mapping[str, Format] | None = None, is_encoder_decoder: bool = False
) -> Conversation | TokenizedRecord:
    """Return the conversation in a record, or its tokens; `formats` are those it may have (default: FORMATS).

    `is_encoder_decoder` says which models the tokens are for; see tokenized_record. Raises DataError, beginning with
    `source`, for a record of no known format or one that cannot be trained on.
    """
    if not isinstance(record, dict):
        raise data_error(source, f"the record is {json_type(record)}; expected an object with named fields", "type")
    check_media(record, "", source)
    format = _detect_format(record, source, FORMATS if formats is None else formats)
    if format is FORMATS["tokens"]:
        read = {*format.fields, *format.ignored}
        return tokenized_record(record, source, unread_keys(record, read, ()), is_encoder_decoder)
    return _conversation(record, source, format)


def _conversation(record: Record, source: str, format: Format) -> Conversation:
    turns = format.turns(record, source)
    unread = _unread(record, format, turns)
    if not is_empty(record.get("history")) and not any(turn.field.startswith("history") for turn in turns):
        raise data_error(source, "history is given beside a complete list of turns; put its turns in that list")
    turns = _with_reasoning(turns, record, source)
    key, system = _system(record, source)
    if system.strip():
        turns = _join([Turn(key, Message("system", system))], turns)
    tools, variables = _tools(record, turns, source), _template_variables(record, source)
    turns = in_order_of_calls(with_hermes_calls(turns, source) if tools else turns)
    messages = tuple(turn.message for turn in turns)
    fields = [turn.field for turn in turns]
    return Conversation(messages, source, tools, unread, variables, fields)


def _unread(record: Record, format: Format, turns: list[Turn]) -> tuple[str, ...]:
    """Return the keys that are not read; `turns` are those that the format has found."""
    turn_fields = dict.fromkeys([*format.fields, *(turn.field.partition("[")[0] for turn in turns)])
    read = {*turn_fields, *format.ignored, *SYSTEM_KEYS, *TOOL_KEYS, TEMPLATE_KEY}
    if "instruction" in turn_fields:
        read.add("input")
    if isinstance(record.get(key := filled_key(record, REASONING_KEYS)), str):
        read.add(key)
    return unread_keys(record, read, turn_fields)


def _detect_format(record: Record, source: str, formats: Mapping[str, Format]) -> Format:
    """Filled fields count first: in a table of mixed formats, a row has null in the columns of the others."""
    filled = {key for key, value in record.items() if not is_empty(value)}
    given = {key for key, value in record.items() if not is_null(value)}
    for keys in (filled, given, record.keys()):
        for format in formats.values():
            if keys >= set(format.fields):
                return format
    if filled & {"text", "content"} and len(formats) > 1:
        field = "text" if "text" in filled else "content"
        problem = (
            f"the record is one text ({field}) without roles, so that the part to train on is unknown; "
            f"expected {_described(formats)}"
        )
        raise data_error(source, problem)
    expected = _described(formats)
    missing = [field for format in formats.values() for field in format.fields if field not in record]
    hint = _spelling_hint(missing, record)
    columns = "" if hint else "; data.columns (scripts/prepare_sft_data.py: --columns) maps other column names"
    raise data_error(source, f"the fields ({key_names(record)}) fit no format{hint}; expected {expected}{columns}")


def _described(formats: Mapping[str, Format]) -> str:
    return " or ".join(f"{name} ({', '.join(format.fields)})" for name, format in formats.items())


def _spelling_hint(missing: Iterable[str], fields: Iterable[str]) -> str:
    """Return a question about the most likely misspelled field, or nothing."""
    pairs = [(field, name) for field in fields for name in missing]
    ratios = [(SequenceMatcher(None, field.lower(), name).ratio(), field, name) for field, name in pairs]
    ratio, field, name = max(ratios, default=(0.0, "", ""))
    return f" (is '{field}' meant to be '{name}'?)" if ratio > 0.8 else ""


def _pair(prompt: str, response: str, record: Record, source: str) -> list[Turn]:
    """Return two texts, or turns in place of either, after the turns of `history`."""
    context = [*_history(record, source), *turns_of(record[prompt], "user", prompt, source)]
    return _join(context, turns_of(record[response], "assistant", response, source))


def _alpaca(record: Record, source: str, response: str = "output") -> list[Turn]:
    instruction = check_text(record["instruction"], "instruction", source)
    parts = [instruction, _optional_text(record, "input", source)]
    prompt = "\n\n".join(part for part in parts if part.strip())
    context = [*_history(record, source), Turn("instruction", Message("user", prompt))]
    return _join(context, turns_of(record[response], "assistant", response, source))


def _preference(record: Record, source: str) -> list[Turn]:
    """Return the chosen answer after its prompt; `chosen` may be a list of turns that repeats the prompt."""
    context = next((field for field in ("messages", "conversations") if not is_empty(record.get(field))), None)
    if context:
        chosen = turns_of(record["chosen"], "assistant", "chosen", source)
        return _join(turn_list(context, record, source), chosen)
    if not is_empty(record.get("instruction")):
        return _alpaca(record, source, "chosen")
    chosen = turns_of(record["chosen"], "assistant", "chosen", source)
    prompt = [] if is_empty(record.get("prompt")) else turns_of(record["prompt"], "user", "prompt", source)
    if not prompt and not isinstance(record["chosen"], list):
        raise data_error(source, "chosen has no prompt; expected prompt, messages or instruction beside it")
    return _join([*_history(record, source), *prompt], chosen)


def _join(before: list[Turn], after: list[Turn]) -> list[Turn]:
    """Return the turns of two fields without repeating those that both contain.

    [system, user] + [user, assistant]            `after` begins with the last turns of `before`, or with all of them
    [user, assistant, user, assistant] + [user, assistant]                   or `before` begins with all of `after`
    """
    first, second = ([turn.message for turn in turns] for turns in (before, after))
    shared = next(n for n in range(min(len(first), len(second)), -1, -1) if first[len(first) - n :] == second[:n])
    contains_all = not shared and first[: len(second)] == second
    return before if contains_all else before + after[shared:]


def _history(record: Record, source: str) -> list[Turn]:
    turns: list[Turn] = []
    history = parse_json(record.get("history"), "history", source)
    if is_empty(history):
        return turns
    if not isinstance(history, list):
        raise data_error(source, f"history is {json_type(history)}; expected a list of pairs of texts", "type")
    for index, pair in enumerate(history):
        name = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise data_error(source, f"{name} is not a pair of texts: [prompt, response]", "type")
        turns.append(Turn(f"{name}[0]", Message("user", pair[0])))
        turns.append(Turn(f"{name}[1]", Message("assistant", pair[1])))
    return turns


def _with_reasoning(turns: list[Turn], record: Record, source: str) -> list[Turn]:
    """Return the turns, with reasoning that is given beside an answer in the turn of that answer."""
    reasoning = one_of(record, REASONING_KEYS, "", source)
    if not isinstance(reasoning, str):
        return turns
    key = filled_key(record, REASONING_KEYS)
    *before, answer = turns
    if "[" in answer.field or answer.message.role != "assistant":
        raise data_error(source, f"{key} is given beside a list of turns; put it in the turn that it belongs to")
    message = replace(answer.message, reasoning=check_text(reasoning, key, source))
    return [*before, answer._replace(message=message)]


def _system(record: Record, source: str) -> tuple[str, str]:
    """Return the key and the text of the system prompt, which may be "" or white space."""
    key, text = filled_key(record, SYSTEM_KEYS), one_of(record, SYSTEM_KEYS, "", source)
    return key, "" if text is None else joined_text(text, key, source)


def _tools(record: Record, turns: Iterable[Turn], source: str) -> tuple[Record, ...]:
    """Return the schemas, which are given beside the turns or in the system turn."""
    found = _schemas(one_of(record, TOOL_KEYS, "", source), "tools", source)
    for turn in turns:
        name = f"{turn.field.rpartition('.')[0]}.tools"
        tools = _schemas(turn.tools, name, source)
        if tools and found and tools != found:
            raise data_error(source, f"tools and {name} contradict each other; keep one of them", "tools")
        found = found or tools
    return found


def _schemas(tools: Any, name: str, source: str) -> tuple[Record, ...]:
    """Return the schemas as {"type": "function", "function": {...}}; the schemas themselves are not changed."""
    tools = parse_json(tools, name, source)
    if is_empty(tools):
        return ()
    if not isinstance(tools, list):
        problem = f"{name} is {json_type(tools)}; expected a list of function schemas, or that list as JSON"
        raise data_error(source, problem, "tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            problem = f"{name}[{index}] is {json_type(tool)}; expected a function schema: an object with a name"
            raise data_error(source, problem, "tools")
    return tuple(map(_schema, tools))


def _schema(tool: Record) -> Record:
    """A schema as chat templates expect it; Anthropic calls the parameters input_schema."""
    if "name" not in tool or "function" in tool:
        return tool
    if "input_schema" in tool and "parameters" not in tool:
        tool = {"parameters" if key == "input_schema" else key: value for key, value in tool.items()}
    return {"type": "function", "function": tool}


def _template_variables(record: Record, source: str) -> Record:
    """Return the variables that a record gives to the chat template."""
    variables = parse_json(record.get(TEMPLATE_KEY), TEMPLATE_KEY, source)
    if is_empty(variables):
        return {}
    if not isinstance(variables, dict):
        raise data_error(
            source, f"{TEMPLATE_KEY} is {json_type(variables)}; expected an object: {{name: value}}", "type"
        )
    if taken := next((name for name in NOT_TEMPLATE_VARIABLES if variables.get(name)), None):
        hint = "write tools beside the turns" if taken == "tools" else "remove it"
        raise data_error(source, f"{TEMPLATE_KEY}.{taken} is not a variable that a record can set; {hint}")
    return {
        name: value for name, value in variables.items() if name not in NOT_TEMPLATE_VARIABLES and not is_null(value)
    }


def _no_turns(record: Record, source: str) -> list[Turn]:
    return []


def _optional_text(record: Record, field: str, source: str) -> str:
    value = record.get(field)
    return "" if is_empty(value) else check_text(value, field, source)


# The first format that fits is used: a list of turns contains more than a prompt beside it. Token ids come last, since
# tokenizing programs leave them beside the text.
FORMATS = {
    "preference": Format(("chosen",), _preference),
    "messages": Format(("messages",), partial(turn_list, "messages")),
    "conversations": Format(("conversations",), partial(turn_list, "conversations")),
    "prompt_response": Format(("prompt", "response"), partial(_pair, "prompt", "response")),
    "prompt_completion": Format(("prompt", "completion"), partial(_pair, "prompt", "completion")),
    "query_response": Format(("query", "response"), partial(_pair, "query", "response")),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "tokens": Format(("input_ids",), _no_turns, ignored=("labels", "loss_mask", "attention_mask")),
}
