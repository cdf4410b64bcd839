"""scripts/prepare_sft_data.py: converts data of any format to train and validation Parquet, without duplicates."""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sft_recipe.cli.flags import Parser
from sft_recipe.data.batching import split_validation
from sft_recipe.data.formats import FORMATS, Columns, read_data
from sft_recipe.data.messages import Conversation
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.sources import resolve_files
from sft_recipe.errors import ConfigError, DataError, run_command

ROWS = 10_000  # of a Parquet row group
REJECTED = "rejected.jsonl"
TURN_KEYS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "train")


@dataclass
class ScanResult:
    """What a first reading finds: which records are used, and what becomes of the others.

    `keeps` says of each record whether it is used; `digests` (uint64) are of those that are, in their order. `keys` are
    those that any of their turns has.
    """

    keeps: list[bool] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: list[BadRecord] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    is_single_turn: bool = True

    @property
    def schema(self) -> pa.Schema:
        """Columns that all the records need, and no others: prompt and response, or messages and tools."""
        if self.is_single_turn:
            return pa.schema([("prompt", pa.string()), ("response", pa.string())])
        keys = [(key, pa.bool_() if key == "train" else pa.string()) for key in TURN_KEYS if key in self.keys]
        tools = [("tools", pa.string())] if "tools" in self.keys else []
        return pa.schema([("messages", pa.list_(pa.struct(keys))), *tools])


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: run(_parser().parse_args(args)))


def _parser() -> Parser:
    parser = Parser(
        "scripts/prepare_sft_data.py --in X [X ...] --out DIR [FLAGS]",
        """\
Reads data of any format and writes train.parquet and validation.parquet: prompt and response if all
conversations are one question and one answer, else messages. Exact duplicates and empty records are
dropped and counted.""",
    )
    parser.add_argument("--in", dest="files", nargs="+", required=True, metavar="X", help="files, globs, hub data sets")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--val_ratio", type=float, default=0.05, help="fraction held out (default: 0.05; 0: none)")
    parser.add_argument("--small", type=int, metavar="N", help="also write train_small.parquet with N examples")
    parser.add_argument("--seed", type=int, default=42, help="seed of the split and of --small (default: 42)")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="default: auto")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="your column names: response=answer"
    )
    parser.add_argument("--on_bad_record", default="error", choices=["error", "skip"], help="default: error")
    return parser


def run(options: argparse.Namespace) -> int:
    """Prepare the data and return 0. Raises DataError for invalid data, ConfigError for invalid options."""
    if not 0 <= options.val_ratio < 1:
        raise ConfigError(f"--val_ratio is {options.val_ratio:g}; it must be a fraction, at least 0 and less than 1")
    if options.small is not None and options.small < 1:
        raise ConfigError(f"--small is {options.small}; it must be a number of examples, 1 or more")
    sources = resolve_files(
        options.files, Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft_recipe"
    )
    if shared := [source.name for source in sources if source.weight != 1 or source.count is not None]:
        raise ConfigError(
            f"{shared[0]} has a weight or count, which applies to training only; here name the file alone"
        )
    files = [file for source in sources for file in source.files]
    columns = Columns(dict(_column(text) for text in options.columns))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        scan = _scan(files, options, columns)
        train, validation = _split(np.asarray(scan.digests, dtype=np.uint64), options)
        parts = {"train": train, "validation": validation}
        if options.small:
            chosen = np.random.default_rng([options.seed, 1]).permutation(len(train))[: options.small]
            parts["train_small"] = train[np.sort(chosen)]
        written = _write(files, options, columns, scan, {name: part for name, part in parts.items() if len(part)})
    except OSError as error:
        raise DataError(f"{options.out} cannot be written: {error.strerror or error}") from None
    _print_summary(scan, written)
    return 0


def _column(text: str) -> tuple[str, str]:
    ours, is_pair, theirs = text.partition("=")
    if not is_pair:
        raise ConfigError(f"--columns {text}: expected NAME=COLUMN, as in response=answer")
    return ours, theirs


def _scan(files: Sequence[Path], options: argparse.Namespace, columns: Columns) -> ScanResult:
    scan, seen = ScanResult(), set()
    for item in _read(files, options.format, columns, "Reading"):
        if isinstance(item, BadRecord):
            if item.error.kind != "empty" and options.on_bad_record == "error":
                raise DataError(f"{item.error}\n--on_bad_record skip leaves such records out and writes them down.")
            scan.dropped["empty" if item.error.kind == "empty" else "cannot be used"] += 1
            scan.rejected.append(item)
            scan.keeps.append(False)
            continue
        record = item.as_record()
        text = json.dumps(record, sort_keys=True)
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        is_new = digest not in seen
        seen.add(digest)
        scan.keeps.append(is_new)
        scan.dropped["exact duplicates"] += not is_new
        if is_new:
            scan.digests.append(digest)
            scan.keys.update(*record["messages"], record)
            scan.is_single_turn = scan.is_single_turn and _is_pair(record)
    columns.check_all_found()
    if not scan.digests:
        raise DataError(f"{', '.join(map(str, files))}: no record can be used")
    return scan


def _read(files: Sequence[Path], format: str, columns: Columns, what: str) -> Iterator[Conversation | BadRecord]:
    items = (item for file in files for item in read_data(file, format, columns))
    console = Console(stderr=True)
    return iter(track(items, what, console=console, transient=True, disable=not console.is_terminal))


def _is_pair(record: dict[str, Any]) -> bool:
    """Whether prompt and response say all of it."""
    turns = record["messages"]
    is_plain = all(turn.keys() == {"role", "content"} for turn in turns) and "tools" not in record
    return is_plain and [turn["role"] for turn in turns] == ["user", "assistant"]


def _split(digests: np.ndarray, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    if not options.val_ratio:
        return np.arange(len(digests)), np.arange(0)
    if len(digests) < 2:
        raise DataError("one example cannot be split; --val_ratio 0 keeps it for training")
    return split_validation(digests, options.val_ratio, options.seed)


def _write(
    files: Sequence[Path], options: argparse.Namespace, columns: Columns, scan: ScanResult, parts: dict[str, np.ndarray]
) -> dict[Path, int]:
    """Every part under its name, all of them or none; returns how many examples each has."""
    finals = {name: options.out / f"{name}.parquet" for name in parts}
    partials = {name: path.with_name(f".{path.name}.{os.getpid()}.partial") for name, path in finals.items()}
    members = {name: set(part.tolist()) for name, part in parts.items()}
    kept = compress(_read(files, options.format, columns, "Writing"), scan.keeps)
    try:
        with ExitStack() as stack:
            writers = {name: stack.enter_context(_Rows(path, scan.schema)) for name, path in partials.items()}
            for number, item in enumerate(kept):
                for name, writer in writers.items():
                    if number in members[name]:
                        writer.add(_row(item, scan.is_single_turn))  # type: ignore[arg-type]  # bad ones are not kept
        for name, path in partials.items():
            path.replace(finals[name])
    finally:
        for path in partials.values():
            path.unlink(missing_ok=True)
    if scan.rejected:
        with (options.out / REJECTED).open("wb") as file:
            file.writelines(item.as_line() for item in scan.rejected)
    return {finals[name]: len(part) for name, part in parts.items()}


class _Rows:
    """A Parquet file that is written row by row."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.writer, self.schema = pq.ParquetWriter(path, schema), schema
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self.writer.close()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows = []


def _row(conversation: Conversation, is_pair: bool) -> dict[str, Any]:
    record = conversation.as_record()
    turns = record["messages"]
    if is_pair:
        return {"prompt": turns[0]["content"], "response": turns[1]["content"]}
    # As JSON, since Arrow would give the calls and schemas of all records the same keys.
    for turn in turns:
        if "tool_calls" in turn:
            turn["tool_calls"] = json.dumps(turn["tool_calls"], ensure_ascii=False)
    tools = json.dumps(record["tools"], ensure_ascii=False) if "tools" in record else None
    return {"messages": turns, "tools": tools}


def _print_summary(scan: ScanResult, written: dict[Path, int]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row(f"{len(scan.keeps):,}", "records read")
    for what, count in sorted(scan.dropped.items()):
        if count:
            table.add_row(f"{count:,}", f"dropped: {what}")
    for path, count in written.items():
        table.add_row(f"{count:,}", str(path))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
