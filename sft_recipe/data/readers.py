"""Reads files of JSON, JSON lines, CSV, Parquet and Arrow, compressed or not, into records, one at a time."""

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from sft_recipe.data.json_text import JsonProblem, decode, loads, skip
from sft_recipe.data.messages import data_error, json_type, not_utf8
from sft_recipe.errors import DataError
from sft_recipe.language import plural

BLOCK = 1 << 20  # bytes of a .json array read at a time
SPACE = re.compile(r"[ \t\r\n]*")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
UNREADABLE = (".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br", ".rar", ".z")  # other compressed files
# How the content of compressed files begins.
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of CSV, in the order of the attempts


@dataclass(frozen=True)
class BadRecord:
    """A BadRecord cannot be used: it has the reason and the record (the text of the line if it is not valid JSON)."""

    error: DataError
    record: Any

    def as_line(self) -> bytes:
        """Return the record and the reason as a line of rejected.jsonl."""
        row = {"reason": str(self.error), "kind": self.error.kind, "record": self.record}
        return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


# Pairs of a position (`line 3`, or in read_records `a.jsonl, line 3`), and the record or BadRecord at that position.
Records = Iterator[tuple[str, Any]]


def read_records(path: Path) -> Records:
    """Return an iterator over (location, record) of a file, in order; a location is `a.jsonl, line 3`.

    Records are read one at a time, so that memory does not grow with the file. A damaged record comes as a BadRecord
    if reading can go on after it. Raises DataError at once for a file that check_file refuses, and while reading for
    a file without records or one that cannot be read further.
    """
    check_file(path)
    return _read_records(path)


def _read_records(path: Path) -> Records:
    is_empty = True
    try:
        for position, record in READERS[suffix_of(path)](path):
            is_empty = False
            yield f"{path}, {position}", record
    except OSError as error:  # also raised for a damaged compressed file
        raise data_error(str(path), f"cannot be read ({error}); is the file complete?", "malformed") from error
    if is_empty:
        raise data_error(str(path), "no records; expected at least one (in CSV, below a header line)", "empty")


def check_file(path: Path) -> None:
    """Raises DataError for a file that is missing, empty, not readable, a directory or of an unknown type."""
    if os.path.isdir(path):
        files = sorted(file.name for file in path.iterdir() if suffix_of(file) in READERS)[:5]
        contents = ", ".join(files) or "no data files"
        raise data_error(str(path), f"a directory (with {contents}); name a file, or a glob: {path / '*.json'}")
    if not os.path.exists(path):
        raise DataError(f"Data file not found: {path.absolute()}{_similar_files(path)}.")
    if suffix_of(path) == ".txt":
        problem = "plain text has no fields for prompt and response"
        raise data_error(str(path), f"{problem}; write records with prompt and response as .jsonl")
    _check_compression(path)
    if suffix_of(path) not in READERS:
        raise data_error(str(path), f"unknown file type; expected one of {FILE_TYPES}")
    if not os.access(path, os.R_OK):
        raise data_error(str(path), "no permission to read this file; change its mode or its owner")
    if path.stat().st_size == 0:
        raise data_error(str(path), "the file is empty; give one with at least one record", "empty")
    if path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as file:
            start = file.read(8)
        if codec := next((name for magic, name in MAGIC.items() if start.startswith(magic)), None):
            raise data_error(str(path), f"the content is compressed ({codec}), but not the name; {ADVICE}")


def _check_compression(path: Path) -> None:
    if path.suffix.lower() in UNREADABLE:
        raise data_error(str(path), f"{path.suffix} files are not read; {ADVICE}")
    if suffix_of(path) in (".parquet", ".arrow") and path.suffix.lower() in COMPRESSED:
        raise data_error(str(path), "Parquet is compressed inside and not read in another compression; decompress it")


def _similar_files(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f" (there is no folder {path.parent.absolute()})"
    similar = get_close_matches(path.name, [file.name for file in path.parent.iterdir()])
    return f"; similar names in that folder: {', '.join(similar)}" if similar else "; check the path"


def suffix_of(path: Path) -> str:
    """Return the suffix without compression: `.jsonl` for `a.jsonl.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def _open(path: Path) -> IO[bytes]:
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=codec))


def _lines(path: Path) -> Iterator[tuple[int, str | BadRecord]]:
    """Yield numbered lines with their ends; split at \\n only, since text may contain other line separators.

    A file without \\n is split at \\r, as older programs on the Macintosh end lines.
    """
    with _open(path) as file:
        first = file.readline()
        lines = chain([first], file) if first.endswith(b"\n") else first.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = data_error(f"{path}, line {number}", not_utf8(line), "malformed")
                problem.__cause__ = error
                yield number, BadRecord(problem, repr(line)[2:-1])


def _text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file in which every line must be valid."""
    for _, line in _lines(path):
        if isinstance(line, BadRecord):
            raise line.error
        yield line


def _malformed(error: json.JSONDecodeError, path: Path, line: int, column: int = 0) -> DataError:
    """Return the error with its position; the parsed text begins after `column` characters of `line`."""
    line_start = error.doc.rfind("\n", 0, error.pos) + 1
    excerpt = error.doc[max(line_start, error.pos - 30) : error.pos + 30].partition("\n")[0].strip()
    position = f"line {line + error.lineno - 1}, column {error.colno + (column if error.lineno == 1 else 0)}"
    problem = f"malformed JSON ({error.msg}) near: {excerpt or 'the end'}"
    return data_error(f"{path}, {position}", problem, "malformed")


def _read_json(path: Path) -> Records:
    array = _JsonArray(path)
    first = array.peek()
    if first == "{" and _is_jsonl(path):
        yield from _read_jsonl(path)
    elif first and first != "[":
        actual = json_type(array.value()[0])
        raise data_error(str(path), f"the file contains {actual}; expected an array of records: [...]", "malformed")
    elif first:
        for number, (record, problem) in enumerate(array.items(), 1):
            position = f"record {number}"
            error = data_error(f"{path}, {position}", problem, "malformed") if problem else None
            yield position, BadRecord(error, record) if error else record


def _is_jsonl(path: Path) -> bool:
    """Return whether the first line is a complete object and more lines follow."""
    lines = (line for line in _text_lines(path) if line.strip())
    first, second = next(lines, ""), next(lines, "")
    try:
        return bool(second) and isinstance(_loads(first.strip()), dict)
    except JsonProblem:
        return bool(second)
    except json.JSONDecodeError:
        return False


class _JsonArray:
    """A JSON array, read in blocks: memory holds one record and the block that contains it."""

    def __init__(self, path: Path):
        self.path = path
        self.blocks = _blocks(path)
        self.text, self.at = "", 0  # the text that has been read, and the position up to which it is parsed
        self.line, self.column = 1, 0  # the line in which `text` begins, and the characters before it in that line

    def items(self) -> Iterator[tuple[Any, str]]:
        """Yield what `value` returns for each item of the array; a comma after the last item is accepted."""
        self.at += 1
        separator = ","
        while self.peek() != "]":
            if separator != ",":
                raise self.malformed("Expecting ',' delimiter", self.at)
            yield self.value()
            separator = self.peek()
            self.at += separator == ","
        self.at += 1
        if self.peek():
            raise self.malformed("Extra data", self.at)

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_more():
                return ""

    def value(self) -> tuple[Any, str]:
        """Return the next value and "", or its text and its JsonProblem. Raises DataError for malformed JSON."""
        self.peek()
        parse: Callable[[str, int], tuple[Any, int]] = decode
        problem = ""
        while True:
            try:
                value, self.at = parse(self.text, self.at)
                return value, problem
            except JsonProblem as error:
                parse, problem = skip, str(error)
            except json.JSONDecodeError as error:
                # The value is incomplete or malformed. The parser reports the position of a wrong character, and the
                # beginning of a string without an end.
                position = error.pos - self.at  # read_more moves the text
                may_continue = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if not (may_continue and self.read_more(len(self.text) - self.at)):
                    raise self.malformed(error.msg, self.at + position) from error

    def read_more(self, minimum: int = 0) -> bool:
        """Drop the parsed text and read at least `minimum` more characters; False at the end of the file."""
        parsed = self.text[: self.at]
        self.line += parsed.count("\n")
        newline = parsed.rfind("\n")
        self.column = len(parsed) - newline - 1 if newline >= 0 else self.column + len(parsed)
        more = ""
        for block in self.blocks:
            more += block
            if len(more) >= max(minimum, 1):
                break
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def malformed(self, message: str, position: int) -> DataError:
        """Return the error for malformed JSON at a position of `text`."""
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
                raise data_error(f"{path}, line {line}", not_utf8(error.object), "malformed") from error
            line += data.count(b"\n")


def _read_jsonl(path: Path) -> Records:
    for number, line in _lines(path):
        position = f"line {number}"
        if isinstance(line, BadRecord):
            yield position, line
            continue
        if line.lstrip().startswith("["):
            problem = "an array begins; expected one object per line (or name the file .json)"
            raise data_error(f"{path}, {position}", problem, "malformed")
        text = line.strip()
        if not text:
            continue
        try:
            yield position, _loads(text)
        except JsonProblem as error:
            yield position, BadRecord(data_error(f"{path}, {position}", str(error), "malformed"), text)
        except json.JSONDecodeError as error:
            indent = len(line) - len(line.lstrip())
            yield position, BadRecord(_malformed(error, path, number, indent), text)


def _loads(text: str) -> Any:
    """Parse a line; a comma after the value is accepted, as in lines cut from an array."""
    try:
        return loads(text)
    except json.JSONDecodeError:
        if text.endswith(","):
            with suppress(json.JSONDecodeError):
                return loads(text[:-1])
        raise


def _read_csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)
    # strict: an open quote would otherwise swallow the rest of the file as one field.
    lines = _text_lines(path)
    start = list(islice(lines, 1))
    delimiter = _delimiter("".join(start))
    rows = csv.reader(chain(start, lines), strict=True, delimiter=delimiter)
    header: list[str] = []
    while True:
        position = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            problem = f"malformed CSV ({error}); check this row's quotes"
            raise data_error(f"{path}, {position}", problem, "malformed") from error
        if row is None:
            return
        if not header:
            header = row
            _check_columns(header, f"{path}, {position}")
        elif row and len(row) != len(header):
            separators = DELIMITERS[delimiter]
            problem = f"{plural(len(row), 'cell')} where the header has {len(header)}; quote those with {separators}"
            yield position, BadRecord(data_error(f"{path}, {position}", problem, "malformed"), row)
        elif row:
            yield position, dict(zip(header, row, strict=True))


def _delimiter(header: str) -> str:
    """Return what separates the cells: a comma, unless the header has cells only with another one."""
    cells = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in DELIMITERS}
    return next((delimiter for delimiter, count in cells.items() if count > 1), ",")


def _check_columns(names: list[str], source: str) -> None:
    """Raises DataError for two columns with one name, since a record can have only one of them."""
    if twice := next((name for name, count in Counter(names).items() if name.strip() and count > 1), None):
        raise data_error(source, f"two columns are named {twice[:40]!r}; rename or remove one of them", "malformed")


def _read_parquet(path: Path) -> Records:
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, str(path))
            yield from file.iter_batches(batch_size=1024)

    return _read_batches(batches(), path, "Parquet")


def _read_arrow(path: Path) -> Records:
    """Read Arrow's IPC format, as files (Feather) and as streams, which is how `datasets` stores data on the disk."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            _check_columns(reader.schema.names, str(path))
            for part in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                part.validate(full=True)  # else offsets of a damaged file lead anywhere in memory
                yield from (part.slice(start, 1024) for start in range(0, len(part), 1024))

    return _read_batches(batches(), path, "Arrow")


def _read_batches(batches: Iterator[Any], path: Path, kind: str) -> Records:
    import pyarrow as pa

    number = 0
    try:
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"record {number}", {key: _without_nulls(value) for key, value in row.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read as {kind} after record {number} ({error}); write the file again"
        raise data_error(str(path), problem, "malformed") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct the keys of all rows; keys that a row does not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Records]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
}
ADVICE = f"decompress it, or name and compress it as one of {', '.join(COMPRESSED)}"
FILE_TYPES = ", ".join(READERS) + f" (the first two and .csv also with {' or '.join(COMPRESSED)})"
