"""What was measured as tables of text."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.prepare.measure import Measured
from benchmarks.prepare.systems import OURS, Plans, Run, Runs, System

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Part:
    """One table under a line that says what it shows."""

    title: str
    header: list[str]
    rows: list[list[str]]


def report(systems: Sequence[System], sizes: Sequence[int], runs: Runs, plans: Plans) -> list[Part]:
    """Speed, the fastest peer, growth, what came out, planning; a table for which nothing was measured is left out."""
    done = [(size, system) for size in sizes for system in systems if (size, system.name) in runs]
    speed = Part(
        "Preparing: medians; 'to ours' is the time over ours, by pairs of runs",
        ["records", "system", "records/s", "tokens/s", "s", "start s", "peak MiB", "disk MiB", "again s", "to ours"],
        [_speed(size, system, runs) for size, system in done],
    )
    fastest = Part(
        "Ours against the fastest of the others",
        ["records", "system", "ours is so many times as fast"],
        [row for size in sizes if (row := _fastest(size, systems, runs))],
    )
    growth = Part(
        f"From {sizes[0]:,} to {sizes[-1]:,} records: 1.00 is time in proportion, and memory that does not grow",
        ["system", "time per record", "peak memory"],
        [row for system in systems if (row := _growth(system, sizes, runs))],
    )
    counts = Part(
        "What came out (and how it differs from ours)",
        ["records", "system", "examples", "tokens", "supervised tokens"],
        [_counts(size, system, runs) for size, system in done],
    )
    planning = Part(
        "Planning an epoch; largest over mean tokens of a rank: mean of all whole steps, and the worst",
        ["examples", "ranks", "a step", "s", "peak MiB", "planned", "worst", "random shares", "worst"],
        [_planning(ranks, batch_size, plan) for (ranks, batch_size), plan in plans.items()],
    )
    return [part for part in (speed, fastest, growth, counts, planning) if part.rows]


def _speed(size: int, system: System, runs: Runs) -> list[str]:
    own = runs[size, system.name]
    seconds = _seconds(own)
    return [
        f"{size:,}",
        system.name,
        f"{size / seconds:,.0f}",
        f"{own[0].first.facts['tokens'] / seconds:,.0f}",
        f"{seconds:.1f}",
        f"{median(run.first.start_seconds for run in own):.1f}",
        f"{_peak(own) / MEBIBYTE:,.0f}",
        f"{own[0].stored / MEBIBYTE:,.0f}" if system.keeps else "none",
        f"{median(run.again for run in own):.2f}" if system.keeps else "the same",
        f"{ratio:.2f}" if (ratio := _to_ours(size, system, runs)) else "",
    ]


def _to_ours(size: int, system: System, runs: Runs) -> float | None:
    """A system's time over ours: the median over pairs of runs that followed each other."""
    pairs = zip(runs.get((size, system.name), []), runs.get((size, OURS.name), []), strict=False)
    ratios = [run.first.seconds / ours.first.seconds for run, ours in pairs]
    return median(ratios) if ratios else None


def _fastest(size: int, systems: Sequence[System], runs: Runs) -> list[str]:
    others = [
        (ratio, system.name) for system in systems if system is not OURS if (ratio := _to_ours(size, system, runs))
    ]
    if not others:
        return []
    ratio, name = min(others)
    return [f"{size:,}", name, f"{ratio:.2f}"]


def _growth(system: System, sizes: Sequence[int], runs: Runs) -> list[str]:
    small, large = (runs.get((size, system.name), []) for size in (sizes[0], sizes[-1]))
    if not small or not large or len(sizes) == 1:
        return []
    time_per_record = _seconds(large) / sizes[-1] / (_seconds(small) / sizes[0])
    return [system.name, f"{time_per_record:.2f}", f"{_peak(large) / _peak(small):.2f}"]


def _counts(size: int, system: System, runs: Runs) -> list[str]:
    own = runs[size, system.name][0].first.facts
    ours = runs[size, OURS.name][0].first.facts if (size, OURS.name) in runs else own
    cells = [f"{size:,}", system.name]
    for key in ("examples", "tokens", "supervised"):
        difference = own[key] - ours[key]
        cells.append(f"{own[key]:,}" + (f" ({difference:+,})" if difference else ""))
    return cells


def _planning(ranks: int, batch_size: int, plan: Measured) -> list[str]:
    ratios = [plan.facts[key] for key in ("planned_mean", "planned_worst", "random_mean", "random_worst")]
    cells = [f"{number:,}" for number in (plan.facts["examples"], ranks, batch_size)]
    return [*cells, f"{plan.seconds:.1f}", f"{plan.peak / MEBIBYTE:,.0f}", *(f"{ratio:.3f}" for ratio in ratios)]


def _seconds(runs: list[Run]) -> float:
    return median(run.first.seconds for run in runs)


def _peak(runs: list[Run]) -> float:
    return median(run.first.peak for run in runs)
