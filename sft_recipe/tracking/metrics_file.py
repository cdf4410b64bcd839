"""metrics.jsonl: one JSON object per optimizer step, on the disk before the next step begins."""

import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_recipe import FORMAT_VERSION
from sft_recipe.files import atomic_write

FILE = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # beside it


class MetricsFile:
    """Rows in the order of their steps, one a line, each with the `format_version` of the run folder.

    Rows wait in memory while the file cannot be written. Two threads may use it: one adds rows, the other needs them
    on the disk.
    """

    def __init__(self, path: Path, steps: int):
        """Keep the file's rows up to step `steps` and drop the later ones, which come again. Raises OSError."""
        self.path = path
        self.problem = ""  # why the newest row could not be written; empty where it was
        self.waiting = b""
        self._lock = threading.Lock()
        rows = b"".join(_rows_up_to(path, steps)) if steps and path.is_file() else b""
        with atomic_write(path) as partial:
            partial.write_bytes(rows)
        self.end = len(rows)  # of the complete rows, in bytes

    @property
    def is_writable(self) -> bool:
        """Return whether the newest row is on the disk."""
        return not self.problem

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, or keep it in memory where that fails and set `problem`. JSON has no NaN: it becomes null."""
        finite = {key: None if _is_nonfinite(value) else value for key, value in row.items()}
        with self._lock:
            self.waiting += json.dumps(finite | {"format_version": FORMAT_VERSION}).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            self.problem = error.strerror or str(error)
        else:
            self.problem = ""

    def flush(self) -> None:
        """Write the rows that wait to the disk. Raises OSError."""
        with self._lock, self.path.open("r+b") as file:  # not created: a run folder that has vanished is an error
            file.truncate(self.end)  # a full disk may have left half a row
            file.seek(self.end)
            file.write(self.waiting)
            file.flush()
            os.fsync(file.fileno())
            self.end, self.waiting = self.end + len(self.waiting), b""

    def read(self) -> list[dict[str, Any]]:
        """Return all rows that are on the disk. Raises OSError."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _rows_up_to(path: Path, steps: int) -> Iterator[bytes]:
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= steps:
                yield line
        except (ValueError, KeyError, TypeError):  # half a row
            continue
