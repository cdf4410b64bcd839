"""Writes train and validation Parquet files from data of any format, without duplicates."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_recipe.data.batching import split_validation
from sft_recipe.data.columns import Columns
from sft_recipe.data.messages import Conversation
from sft_recipe.data.pipeline import read_data
from sft_recipe.data.pretokenized import TokenizedRecord
from sft_recipe.data.quality import Problem, QualityChecks
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.remarks import Remarks
from sft_recipe.errors import DataError
from sft_recipe.files import atomic_write, digest_number
from sft_recipe.progress import progress_bar

ROW_GROUP = 10_000  # rows
REJECTED, DROPPED = "rejected.jsonl", "dropped.jsonl"
WRITTEN = ("train.parquet", "validation.parquet", "train_small.parquet", REJECTED, DROPPED)
JSON_KEYS = ("tools", "chat_template_kwargs")  # as JSON text: Arrow would give all records the same keys
TURN_KEYS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "train")


@dataclass(frozen=True)
class ParquetOptions:
    """What to write: `val_ratio` is the fraction held out, `small` the size of an additional subset of train.

    Records with the problems `drop` (see quality.KINDS) are left out; `questions` are those of benchmarks.
    """

    val_ratio: float = 0.05
    small: int | None = None
    seed: int = 42
    format: str = "auto"
    on_bad_record: str = "error"
    drop: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


@dataclass
class ScanResult:
    """Holds the result of reading all records once.

    `is_used` has an entry for each record. `digests` (uint64) are those of the used records, in order. `dropped` counts
    the other records by reason. `keys` are the keys that occur in any record or turn. `is_single_turn`: all used
    records consist of one prompt and one response. `remarks` are about all records that could be used. `doubtful` are
    lines about the records that were dropped for their quality.
    """

    is_used: list[bool] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[BadRecord] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    is_single_turn: bool = True
    remarks: Remarks = field(default_factory=Remarks)
    doubtful: list[bytes] = field(default_factory=list)

    @property
    def schema(self) -> pa.Schema:
        """Return the columns that the records need: prompt and response, or messages, tools and variables."""
        if self.is_single_turn:
            return pa.schema([("prompt", pa.string()), ("response", pa.string())])
        keys = [(key, pa.bool_() if key == "train" else pa.string()) for key in TURN_KEYS if key in self.keys]
        others = [(key, pa.string()) for key in JSON_KEYS if key in self.keys]
        return pa.schema([("messages", pa.list_(pa.struct(keys))), *others])


def write_parquet(
    files: Sequence[Path], folder: Path, columns: Columns, options: ParquetOptions
) -> tuple[ScanResult, dict[Path, int]]:
    """Write train.parquet, validation.parquet and, with `options.small`, train_small.parquet to a folder.

    Either all files are written or none. Bad records are written to rejected.jsonl. Returns the scan and the number of
    examples in each file. Raises DataError for data that cannot be used, and if the folder cannot be written to or a
    file to read is one that would be written.
    """
    outputs = {(folder / name).resolve() for name in WRITTEN}
    if own := [file for file in files if file.resolve() in outputs]:
        raise DataError(f"{own[0]} would be replaced by a part of itself; name another folder to write to with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scan = _scan(files, options, columns)
        subsets = {name: indices for name, indices in _split(scan, options).items() if len(indices)}
        paths = {name: folder / f"{name}.parquet" for name in subsets}
        _write(paths, subsets, scan, compress(_read(files, options, columns, "Writing"), scan.is_used))
        for name, lines in ((REJECTED, [item.as_line() for item in scan.rejected]), (DROPPED, scan.doubtful)):
            if lines:
                (folder / name).write_bytes(b"".join(lines))
            else:
                (folder / name).unlink(missing_ok=True)  # of an earlier call
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from None
    return scan, {paths[name]: len(indices) for name, indices in subsets.items()}


def _scan(files: Sequence[Path], options: ParquetOptions, columns: Columns) -> ScanResult:
    scan, seen = ScanResult(), set()
    checks = QualityChecks(options.questions) if options.drop else None
    for item in _read(files, options, columns, "Reading"):
        if isinstance(item, BadRecord):
            is_empty = item.error.kind == "empty"
            if not is_empty and options.on_bad_record == "error":
                raise DataError(f"{item.error}\n--on_bad_record skip leaves such records out and lists them.")
            scan.dropped["empty" if is_empty else "cannot be used"] += 1
            scan.rejected.append(item)
            scan.is_used.append(False)
            continue
        scan.remarks.add(item)
        record = item.as_record()
        text = json.dumps(record, sort_keys=True)
        digest = digest_number(text.encode())
        is_new = digest not in seen
        seen.add(digest)
        scan.dropped["exact duplicates"] += not is_new
        if is_new and checks and (problem := _doubt(checks, item, options.drop)):
            is_new = False
            scan.dropped[problem.kind.replace("_", " ")] += 1
            row = {"kind": problem.kind, "reason": problem.reason, "source": item.source, "record": record}
            scan.doubtful.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        scan.is_used.append(is_new)
        if is_new:
            scan.digests.append(digest)
            scan.keys.update(*record["messages"], record)
            scan.is_single_turn = scan.is_single_turn and _is_single_turn(record)
    columns.check_all_found()
    if not scan.digests:
        raise DataError(f"{', '.join(map(str, files))}: no record can be used")
    return scan


def _doubt(checks: QualityChecks, conversation: Conversation, drop: Sequence[str]) -> Problem | None:
    """The first problem for which a record is dropped; one that is dropped is not compared with later ones."""
    problems = checks.check(conversation, lambda found: not any(problem.kind in drop for problem in found))
    return next((problem for problem in problems if problem.kind in drop), None)


def _read(
    files: Sequence[Path], options: ParquetOptions, columns: Columns, description: str
) -> Iterator[Conversation | BadRecord]:
    with progress_bar(description, "records") as advance:
        for file in files:
            for item in read_data(file, options.format, columns):
                if isinstance(item, TokenizedRecord):
                    raise DataError(f"{item.source}: the record holds token ids, which train.sh reads as they are.")
                yield item
                advance(1)


def _is_single_turn(record: dict[str, Any]) -> bool:
    """Whether the columns prompt and response can represent the record."""
    turns = record["messages"]
    is_plain = all(turn.keys() == {"role", "content"} for turn in turns) and record.keys() == {"messages"}
    return is_plain and [turn["role"] for turn in turns] == ["user", "assistant"]


def _split(scan: ScanResult, options: ParquetOptions) -> dict[str, np.ndarray]:
    """The indices of the used records in each file, int64."""
    digests = np.asarray(scan.digests, dtype=np.uint64)
    subsets = {"train": np.arange(len(digests))}
    if options.val_ratio:
        if len(digests) < 2:
            raise DataError("one example cannot be split; --val_ratio 0 keeps it for training")
        train, validation = split_validation(digests, options.val_ratio, options.seed)
        subsets = {"train": train, "validation": validation}
    if options.small:
        train = subsets["train"]
        sample = np.random.default_rng([options.seed, 1]).permutation(len(train))[: options.small]
        subsets["train_small"] = train[np.sort(sample)]
    return subsets


def _write(
    paths: dict[str, Path],
    subsets: dict[str, np.ndarray],
    scan: ScanResult,
    used: Iterator[Conversation | BadRecord],
) -> None:
    members = {name: set(indices.tolist()) for name, indices in subsets.items()}
    with ExitStack() as stack:
        # All partial files first, so that every writer is closed before the first file gets its name.
        partials = {name: stack.enter_context(atomic_write(path)) for name, path in paths.items()}
        writers = {name: stack.enter_context(_RowWriter(path, scan.schema)) for name, path in partials.items()}
        for index, item in enumerate(used):
            assert isinstance(item, Conversation)
            for name, writer in writers.items():
                if index in members[name]:
                    writer.add(_row(item, scan.is_single_turn))


class _RowWriter:
    """A Parquet file that is written row by row."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.writer, self.schema = pq.ParquetWriter(path, schema), schema
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self.writer.close()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; rows are written in groups."""
        self.rows.append(row)
        if len(self.rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows = []


def _row(conversation: Conversation, is_single_turn: bool) -> dict[str, Any]:
    record = conversation.as_record()
    turns = record["messages"]
    if is_single_turn:
        return {"prompt": turns[0]["content"], "response": turns[1]["content"]}
    for turn in turns:
        if "tool_calls" in turn:
            turn["tool_calls"] = json.dumps(turn["tool_calls"], ensure_ascii=False)
    return record | {key: json.dumps(record[key], ensure_ascii=False) for key in JSON_KEYS if key in record}
