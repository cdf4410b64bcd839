"""Measures the time from ./train.sh to the end of the first step: SFT_TIMING=1 shows it, else nothing is measured.

A mark ends a phase. The launcher exports its phases to its ranks in an environment variable.
"""

import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

ENABLED = os.environ.get("SFT_TIMING", "0").lower() not in ("", "0", "false")
STARTED = "SFT_TIMING_STARTED"  # set by train.sh: seconds since 1970
PHASES = "SFT_TIMING_PHASES"
FILE = "timing.json"


class Phase(TypedDict):
    """`at` is the end of the phase in seconds since the start of train.sh; `cpu_seconds` counts all threads."""

    phase: str
    seconds: float
    at: float
    cpu_seconds: float


_phases: list[Phase] = []
_cpu = 0.0  # CPU seconds of this process at its last mark


def mark(phase: str) -> None:
    """Record that `phase` ends now."""
    global _cpu
    if not ENABLED:
        return
    now, cpu = time.time(), time.process_time()
    at = now - float(os.environ.setdefault(STARTED, str(now - cpu)).replace(",", "."))  # some locales write 1,5
    before = _phases[-1]["at"] if _phases else 0.0
    _phases.append(Phase(phase=phase, seconds=round(at - before, 3), at=round(at, 3), cpu_seconds=round(cpu - _cpu, 3)))
    _cpu = cpu


def export_timings() -> None:
    """Pass the phases so far to processes that start from now on."""
    if ENABLED:
        os.environ[PHASES] = json.dumps(_phases)


def import_timings() -> None:
    """Take over the exported phases, in a process that starts to measure its time."""
    global _cpu
    _phases[:], _cpu = json.loads(os.environ.get(PHASES, "[]")), 0.0


def table() -> str:
    """Return the phases so far as a table of text."""
    lines = [f"{'phase':<32}{'seconds':>9}{'at':>9}{'CPU':>9}"]
    lines += [f"{row['phase']:<32}{row['seconds']:9.2f}{row['at']:9.2f}{row['cpu_seconds']:9.2f}" for row in _phases]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write the phases so far to timing.json, as a list. Raises OSError."""
    (folder / FILE).write_text(json.dumps(_phases, indent=1) + "\n")


@contextmanager
def paused_gc() -> Iterator[None]:
    """Pause garbage collection for a block of imports, which takes a fifth of their time and finds nothing.

    Afterwards the collector skips what was imported.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
