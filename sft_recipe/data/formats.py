"""Data files: container -> records -> Conversation, with one small reader per container and per format."""

import csv
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from sft_recipe.data.messages import Conversation, Message, check_text, kind, located
from sft_recipe.errors import DataError

Record = dict[str, Any]
Turn = tuple[str, Any, Any]  # the field that the content stands in, the role, the content


# Formats: record -> turns. Conversation checks roles and contents, so the readers only say what stands where.


@dataclass(frozen=True)
class Format:
    """A record with all of `fields` is read by `turns(record, source)`."""

    fields: tuple[str, ...]
    turns: Callable[[Record, str], list[Turn]]


def _prompt_response(record: Record, source: str) -> list[Turn]:
    return [("prompt", "user", record["prompt"]), ("response", "assistant", record["response"])]


def _alpaca(record: Record, source: str) -> list[Turn]:
    instruction = check_text(record["instruction"], "instruction", source)
    parts = [instruction, _optional_text(record, "input", source)]
    prompt = "\n\n".join(part for part in parts if part.strip())
    return [("instruction", "user", prompt), ("output", "assistant", record["output"])]


def _turn_list(field: str, record: Record, source: str) -> list[Turn]:
    turns = record[field]
    if isinstance(turns, str):  # a CSV cell holds a list as JSON
        with suppress(ValueError):
            turns = json.loads(turns)
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind(turns)
        raise located(source, f"{field} is {found}; expected a list of turns with role and content")
    return [_list_turn(turn, f"{field}[{index}]", source) for index, turn in enumerate(turns)]


def _list_turn(turn: Any, name: str, source: str) -> Turn:
    if not isinstance(turn, dict):
        raise located(source, f"{name} is {kind(turn)}; expected an object with role and content")
    for key in ("role", "content"):
        if key not in turn:
            raise located(source, f"{name}.{key} is missing; expected role and content, found {_names(turn)}")
    _refuse_unread(turn, ("tool_calls", "reasoning_content", "weight", "train"), f"{name}.", source)
    return f"{name}.content", turn["role"], turn["content"]


# The first that fits wins: a list of turns holds more than a prompt that stands beside it.
FORMATS = {
    "messages": Format(("messages",), partial(_turn_list, "messages")),
    "conversations": Format(("conversations",), partial(_turn_list, "conversations")),
    "prompt_response": Format(("prompt", "response"), _prompt_response),
    "alpaca": Format(("instruction", "output"), _alpaca),
}


def read_conversations(path: str | Path, format: str = "auto") -> Iterator[Conversation]:
    """Read a .json, .jsonl, .parquet or .csv file whose records are in any of FORMATS, or in the one named.

    Raises DataError: at once for an unknown format or a file that cannot be used; while reading for a damaged
    or empty file and for the first bad record, naming file, record or line, field, and what was expected.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"Unknown data format '{format}'; known are auto, {', '.join(FORMATS)}.")
    path = Path(path)
    _check_file(path)
    return _conversations(path, FORMATS if format == "auto" else {format: FORMATS[format]})


def _conversations(path: Path, formats: Mapping[str, Format]) -> Iterator[Conversation]:
    empty = True
    for place, record in CONTAINERS[path.suffix.lower()](path):
        empty = False
        yield _to_conversation(record, f"{path}, {place}", formats)
    if empty:
        raise located(str(path), "no records; expected at least one (in CSV, below a header line)")


def _to_conversation(record: Any, source: str, formats: Mapping[str, Format]) -> Conversation:
    if not isinstance(record, dict):
        raise located(source, f"the record is {kind(record)}; expected an object with named fields")
    _refuse_unread(record, ("history", "tools"), "", source)
    turns = _recognise(record, source, formats).turns(record, source)
    system = _optional_text(record, "system", source)
    if system.strip():
        turns.insert(0, ("system", "system", system))
    messages = tuple(Message(role, content) for _, role, content in turns)
    return Conversation(messages, source, fields=[field for field, _, _ in turns])


def _recognise(record: Record, source: str, formats: Mapping[str, Format]) -> Format:
    """Filled fields count first: in a table of mixed formats, a row has null in the columns of the others."""
    filled = {key for key, value in record.items() if value is not None}
    for keys in (filled, record.keys()):
        for format in formats.values():
            if keys >= set(format.fields):
                return format
    known = " or ".join(f"{name} ({', '.join(format.fields)})" for name, format in formats.items())
    missing = [field for format in formats.values() for field in format.fields if field not in record]
    hint = _hint(missing, record)
    raise located(source, f"the fields ({_names(record)}) fit no format{hint}; expected {known}")


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


def _refuse_unread(holder: Record, keys: Sequence[str], prefix: str, source: str) -> None:
    """These change what a conversation means, so leaving them out in silence would train something else."""
    for key in keys:
        if holder.get(key) not in (None, "", [], {}):
            raise located(source, f"{prefix}{key} is not supported; remove it to train without it")


# Containers: file -> (place, record).


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; split at \\n only, since text may hold other line separators."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise located(f"{path}, line {number}", "not UTF-8; save the file as UTF-8") from error


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line_start = text.rfind("\n", 0, error.pos) + 1
        excerpt = text[max(line_start, error.pos - 30) : error.pos + 30].partition("\n")[0].strip()
        place = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise located(place, f"malformed JSON ({error.msg}) near: {excerpt or 'the end'}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    if _is_jsonl(path):
        yield from _read_jsonl(path)
        return
    text = "".join(line for _, line in _lines(path))
    records = _parse_json(text, path) if text.strip() else []
    if not isinstance(records, list):
        raise located(str(path), f"the file holds {kind(records)}; expected an array of records: [...]")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _is_jsonl(path: Path) -> bool:
    """Whether the first line is an object by itself and more follows."""
    filled = (line for _, line in _lines(path) if line.strip())
    first, second = next(filled, ""), next(filled, "")
    with suppress(ValueError):
        return bool(second) and isinstance(json.loads(first), dict)
    return False


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.lstrip().startswith("["):
            problem = "an array begins; expected one object per line (or name the file .json)"
            raise located(f"{path}, line {number}", problem)
        if line.strip():
            yield f"line {number}", _parse_json(line.rstrip("\r\n"), path, number)


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    # strict: an open quote would otherwise swallow the rest of the file as one field.
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise located(f"{path}, {place}", f"malformed CSV ({error}); check this row's quotes") from error
        if row is None:
            return
        if not header:
            header = row
        elif row and len(row) != len(header):
            problem = f"{len(row)} cells where the header has {len(header)}; quote cells that hold commas"
            raise located(f"{path}, {place}", problem)
        elif row:
            yield place, dict(zip(header, row, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"record {number}", {key: _without_nulls(value) for key, value in row.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read as Parquet after record {number} ({error}); write it anew"
        raise located(str(path), problem) from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all keys of all rows; those that a row lacks are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


CONTAINERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}


# Files: what the user wrote -> paths.


def resolve_files(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """The data files that a path, a glob or a list of those names; what a glob matches comes sorted.

    Raises DataError for a file that is missing, empty, unreadable, a directory, of an unknown kind, or given
    twice, and for a glob that matches nothing.
    """
    items = [spec] if isinstance(spec, str | Path) else spec
    files = [file for item in items for file in _expand(Path(item).expanduser())]
    if not files:
        raise DataError("No data file is given; name a file, a glob or a list of those.")
    seen: set[Path] = set()
    for file in files:
        _check_file(file)
        if file.resolve() in seen:
            raise located(str(file), "the file is given twice; name each data file once")
        seen.add(file.resolve())
    return files


def _expand(path: Path) -> list[Path]:
    if os.path.exists(path) or not any(mark in str(path) for mark in "*?["):
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        raise DataError(f"No file matches {path.absolute()}; check the pattern.")
    return found


def _check_file(path: Path) -> None:
    if os.path.isdir(path):
        data = sorted(file.name for file in path.iterdir() if file.suffix.lower() in CONTAINERS)[:5]
        inside = ", ".join(data) or "no data files"
        raise located(str(path), f"a directory (with {inside}); name a file, or a glob: {path / '*.json'}")
    if not os.path.exists(path):
        raise DataError(f"Data file not found: {path.absolute()}{_beside(path)}.")
    if path.suffix.lower() not in CONTAINERS:
        raise located(str(path), f"unknown kind of file; expected one of {', '.join(CONTAINERS)}")
    if not os.access(path, os.R_OK):
        raise located(str(path), "no permission to read this file; change its mode or its owner")
    if path.stat().st_size == 0:
        raise located(str(path), "the file is empty; give one with at least one record")


def _beside(path: Path) -> str:
    """What else the missing file could have been."""
    if not os.path.isdir(path.parent):
        return f" (there is no folder {path.parent.absolute()})"
    near = get_close_matches(path.name, [file.name for file in path.parent.iterdir()])
    return f"; near it: {', '.join(near)}" if near else "; check the path"
