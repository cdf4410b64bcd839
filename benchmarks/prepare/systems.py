"""The ways to prepare that are compared, and what a run of one is."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.prepare.measure import Measured

CORES = str(len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class System:
    """Its runner, whose environment it needs, the form of corpus that it reads best, the runner's options."""

    name: str
    peer: str  # empty: our own
    runner: str
    corpus: str
    options: Sequence[str] = ()
    keeps: bool = True  # something on disk that makes the second start quick


OURS = System("ours", "", "run_ours.py", "messages.jsonl")
SYSTEMS = [
    OURS,
    System("TRL, completion-only", "trl", "run_trl.py", "completion.jsonl", ["completion", CORES]),
    System("TRL, assistant-only", "trl", "run_trl.py", "messages.jsonl", ["assistant", CORES]),
    System("TRL, its default processes", "trl", "run_trl.py", "completion.jsonl", ["completion", "default"]),
    System("verl", "verl", "run_verl.py", "messages.parquet", [CORES], keeps=False),
]


@dataclass(frozen=True)
class Run:
    """One preparation from nothing, the bytes that it left on disk, and the seconds of a second start on them."""

    first: Measured
    stored: int = 0
    again: float = 0.0


Runs = dict[tuple[int, str], list[Run]]  # by size and the system's name, in the order of the repeats
Plans = dict[tuple[int, int], Measured]  # by ranks and examples a step
