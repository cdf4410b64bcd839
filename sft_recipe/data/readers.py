"""Containers: a file of JSON, JSON lines, CSV or Parquet, perhaps compressed -> its records, one at a time."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sft_recipe.data.messages import data_error, json_type
from sft_recipe.errors import DataError

BLOCK = 1 << 20  # bytes of a .json array read at a time
SPACE = re.compile(r"[ \t\r\n]*")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
PARSER = json.JSONDecoder()


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: why, and what stands there (a line's text where it is no record at all)."""

    error: DataError
    record: Any

    def as_line(self) -> bytes:
        """A line of rejected.jsonl."""
        row = {"reason": str(self.error), "kind": self.error.kind, "record": self.record}
        return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


Records = Iterator[tuple[str, Any]]  # (place in the file, record or Rejected)


def suffix_of(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`: what is inside."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def read_records(path: Path) -> Records:
    """Places and records of a file, in order and one at a time; memory does not grow with the file.

    A record that is damaged alone comes as Rejected. Raises DataError where the rest cannot be read either.
    """
    try:
        yield from CONTAINERS[suffix_of(path)](path)
    except OSError as error:  # a damaged compressed file is one, too
        raise data_error(str(path), f"cannot be read ({error}); is the file whole?", "malformed") from error


def _open(path: Path) -> IO[bytes]:
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=codec))


def _lines(path: Path) -> Iterator[tuple[int, str | BadRecord]]:
    """Numbered lines with their ends; split at \\n only, since text may hold other line separators."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = data_error(f"{path}, line {number}", "not UTF-8; save the file as UTF-8", "malformed")
                problem.__cause__ = error
                yield number, BadRecord(problem, repr(line)[2:-1])


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a file that makes no sense without any one of them."""
    for _, line in _lines(path):
        if isinstance(line, BadRecord):
            raise line.error
        yield line


def _malformed(error: json.JSONDecodeError, path: Path, line: int, column: int = 0) -> DataError:
    """What is wrong, where: the text that was parsed begins after `column` characters of `line`."""
    line_start = error.doc.rfind("\n", 0, error.pos) + 1
    excerpt = error.doc[max(line_start, error.pos - 30) : error.pos + 30].partition("\n")[0].strip()
    place = f"line {line + error.lineno - 1}, column {error.colno + (column if error.lineno == 1 else 0)}"
    near = f"malformed JSON ({error.msg}) near: {excerpt or 'the end'}"
    return data_error(f"{path}, {place}", near, "malformed")


def _read_json(path: Path) -> Records:
    array = _Array(path)
    first = array.peek()
    if first == "{" and _is_jsonl(path):
        yield from _read_jsonl(path)
    elif first and first != "[":
        found = json_type(array.value())
        raise data_error(str(path), f"the file holds {found}; expected an array of records: [...]", "malformed")
    elif first:
        yield from ((f"record {number}", record) for number, record in enumerate(array.items(), 1))


def _is_jsonl(path: Path) -> bool:
    """Whether the first line is an object by itself and more follows."""
    filled = (line for line in _text_lines(path) if line.strip())
    first, second = next(filled, ""), next(filled, "")
    with suppress(ValueError):
        return bool(second) and isinstance(_loads(first.strip()), dict)
    return False


class _Array:
    """A JSON array, read block by block: holds one record and the block it stands in."""

    def __init__(self, path: Path):
        self.path = path
        self.blocks = _blocks(path)
        self.text, self.at, self.line = "", 0, 1  # what is read, how far it is used, the line that it begins in
        self.column = 0  # characters before `text` in that line

    def items(self) -> Iterator[Any]:
        self.at += 1
        mark = ","
        while self.peek() != "]":  # a comma after the last record does no harm
            if mark != ",":
                raise self.malformed("Expecting ',' delimiter", self.at)
            yield self.value()
            mark = self.peek()
            self.at += mark == ","
        self.at += 1
        if self.peek():
            raise self.malformed("Extra data", self.at)

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_on():
                return ""

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                found, self.at = PARSER.raw_decode(self.text, self.at)
                return found
            except json.JSONDecodeError as error:
                # Incomplete or wrong? A wrong character shows where it stands; an open string shows its beginning.
                position = error.pos - self.at  # reading on moves the text
                is_open = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if not (is_open and self.read_on(len(self.text) - self.at)):
                    raise self.malformed(error.msg, self.at + position) from error

    def read_on(self, least: int = 0) -> bool:
        """Forget what is used, and read as much again as is not; False at the end of the file."""
        used = self.text[: self.at]
        self.line += used.count("\n")
        newline = used.rfind("\n")
        self.column = len(used) - newline - 1 if newline >= 0 else self.column + len(used)
        more = ""
        for block in self.blocks:
            more += block
            if len(more) >= max(least, 1):
                break
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def malformed(self, message: str, position: int) -> DataError:
        error = json.JSONDecodeError(message, self.text, position)
        return _malformed(error, self.path, self.line, self.column)


def _blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, ended = 1, False
    with _open(path) as file:
        while not ended:
            data = file.read(BLOCK)
            ended = not data
            try:
                yield decoder.decode(data, final=ended)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise data_error(f"{path}, line {line}", "not UTF-8; save the file as UTF-8", "malformed") from error
            line += data.count(b"\n")


def _read_jsonl(path: Path) -> Records:
    for number, line in _lines(path):
        place = f"line {number}"
        if isinstance(line, BadRecord):
            yield place, line
            continue
        if line.lstrip().startswith("["):
            problem = "an array begins; expected one object per line (or name the file .json)"
            raise data_error(f"{path}, {place}", problem, "malformed")
        text = line.strip()
        if not text:
            continue
        try:
            yield place, _loads(text)
        except json.JSONDecodeError as error:
            indent = len(line) - len(line.lstrip())
            yield place, BadRecord(_malformed(error, path, number, indent), text)


def _loads(text: str) -> Any:
    """A line's value; a comma behind it, as in an array that was taken apart, does no harm."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if text.endswith(","):
            with suppress(json.JSONDecodeError):
                return json.loads(text[:-1])
        raise


def _read_csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)
    # strict: an open quote would otherwise swallow the rest of the file as one field.
    rows = csv.reader(_text_lines(path), strict=True)
    header: list[str] = []
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            problem = f"malformed CSV ({error}); check this row's quotes"
            raise data_error(f"{path}, {place}", problem, "malformed") from error
        if row is None:
            return
        if not header:
            header = row
        elif row and len(row) != len(header):
            problem = f"{len(row)} cells where the header has {len(header)}; quote cells that hold commas"
            yield place, BadRecord(data_error(f"{path}, {place}", problem, "malformed"), row)
        elif row:
            yield place, dict(zip(header, row, strict=True))


def _read_parquet(path: Path) -> Records:
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
        raise data_error(str(path), problem, "malformed") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all keys of all rows; those that a row lacks are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


CONTAINERS: dict[str, Callable[[Path], Records]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
KNOWN = ", ".join(CONTAINERS) + f" (the first two and .csv also with {' or '.join(COMPRESSED)})"
