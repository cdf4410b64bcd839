"""Where the time from ./train.sh to the end of the first step goes: SFT_TIMING=1 shows it, else nothing is measured.

A mark ends a phase. Those of the launcher go on to its ranks in an environment variable.
"""

import json
import os
import time
from pathlib import Path
from typing import TypedDict

ENABLED = os.environ.get("SFT_TIMING", "0").lower() not in ("", "0", "false")
STARTED = "SFT_TIMING_STARTED"  # set by train.sh: seconds since 1970
PHASES = "SFT_TIMING_PHASES"
FILE = "timing.json"


class Phase(TypedDict):
    """`at` is when it ended, in seconds since train.sh started; `cpu_seconds` count all threads of its process."""

    phase: str
    seconds: float
    at: float
    cpu_seconds: float


_phases: list[Phase] = []
_cpu = 0.0  # what this process had used at its last mark


def mark(phase: str) -> None:
    """This phase ends here."""
    global _cpu
    if not ENABLED:
        return
    now, cpu = time.time(), time.process_time()
    at = now - float(os.environ.setdefault(STARTED, str(now - cpu)).replace(",", "."))  # some locales write 1,5
    before = _phases[-1]["at"] if _phases else 0.0
    _phases.append(Phase(phase=phase, seconds=round(at - before, 3), at=round(at, 3), cpu_seconds=round(cpu - _cpu, 3)))
    _cpu = cpu


def export_timings() -> None:
    """To processes that are started from here on."""
    if ENABLED:
        os.environ[PHASES] = json.dumps(_phases)


def import_timings() -> None:
    """What was handed on to this process, whose own time begins."""
    global _cpu
    _phases[:], _cpu = json.loads(os.environ.get(PHASES, "[]")), 0.0


def table() -> str:
    """The phases so far, for people."""
    lines = [f"{'phase':<32}{'seconds':>9}{'at':>9}{'CPU':>9}"]
    lines += [f"{one['phase']:<32}{one['seconds']:9.2f}{one['at']:9.2f}{one['cpu_seconds']:9.2f}" for one in _phases]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """The phases so far, as a list in timing.json. Raises OSError."""
    (folder / FILE).write_text(json.dumps(_phases, indent=1) + "\n")
