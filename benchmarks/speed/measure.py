"""Run one configuration in a separate process and read its stopwatch."""

import json
import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

INSIDE = Path(__file__).resolve().parent / "inside"
TICK = os.sysconf("SC_CLK_TCK")


class RunFailed(Exception):
    """A run failed; the message is the last line of its output."""


@dataclass(frozen=True)
class Measurement:
    """One run. `begin` (the first training forward) and `steps` (their ends) are seconds since the process was started.

    `tokens` and `supervised` are of each step; `peak` is the resident memory of the training processes up to the last
    step (`gpu_peak`: of the GPU), bytes; `others_cpu` is the share of the machine that other processes took;
    `peak_flops` is the machine's matrix product speed just before, FLOP/s.
    """

    begin: float
    steps: list[float]
    tokens: list[int]
    supervised: list[int]
    peak: int
    gpu_peak: int
    others_cpu: float
    peak_flops: float
    validation_loss: float | None = None

    @property
    def seconds(self) -> float:
        return self.steps[-1] - self.begin

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens) / self.seconds

    @property
    def later_tokens_per_s(self) -> float:
        """Without the first step."""
        later = self.steps[-1] - self.steps[0]
        return sum(self.tokens[1:]) / later if later else float("nan")

    @property
    def first_step(self) -> float:
        """Seconds from the start of the process to the end of its first step."""
        return self.steps[0]

    def with_validation_loss(self, loss: float) -> "Measurement":
        return replace(self, validation_loss=loss)


@dataclass(frozen=True)
class Ran:
    """How a process went: when it was started (monotonic clock), and what others took of the machine meanwhile."""

    started: float
    others_cpu: float


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path) -> Ran:
    """Run to the end, with the stopwatch writing into `folder`. Raises RunFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"PYTHONPATH": str(INSIDE), "STOPWATCH": str(folder)}
    busy, own, started = _busy_seconds(), _own_seconds(), time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(command, env={**os.environ, **environment, **paths}, stdout=file, stderr=file)
    seconds = time.monotonic() - started
    others = _busy_seconds() - busy - (_own_seconds() - own)
    if done.returncode:
        output = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RunFailed(output[-1] if output else f"exit code {done.returncode}")
    return Ran(started, max(0.0, others / (os.cpu_count() or 1) / seconds))


def read_stopwatch(folder: Path, ran: Ran, peak_flops: float) -> Measurement:
    """Of all ranks of a run: a step ends when the last of them is done, memory is their sum. Raises RunFailed."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    if not ranks:
        raise RunFailed("it took no step")
    return Measurement(
        begin=min(rank["begin"] for rank in ranks) - ran.started,
        steps=[max(ends) - ran.started for ends in zip(*(rank["steps"] for rank in ranks), strict=True)],
        tokens=[sum(step) for step in zip(*(rank["tokens"] for rank in ranks), strict=True)],
        supervised=[sum(step) for step in zip(*(rank["supervised"] for rank in ranks), strict=True)],
        peak=sum(rank["peak"][-1] for rank in ranks),
        gpu_peak=sum(rank["gpu_peak"][-1] for rank in ranks),
        others_cpu=ran.others_cpu,
        peak_flops=peak_flops,
    )


def counted_by_recipe(measured: Measurement, metrics: Path) -> Measurement:
    """With the numbers of tokens from our run's metrics.jsonl: what enters the model may hold each token less often."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    tokens, supervised = ([row[f"train/{key}"] for row in rows] for key in ("tokens", "supervised_tokens"))
    return replace(measured, tokens=tokens, supervised=supervised)


def keep(measured: Measurement, about: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "measured": asdict(measured)}, indent=1) + "\n")


def kept(path: Path) -> Measurement | None:
    return Measurement(**json.loads(path.read_text())["measured"]) if path.is_file() else None


def _busy_seconds() -> float:
    """That the machine's CPUs have worked since they were started, for anybody; and what the hypervisor took."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(ticks[:3]) + sum(ticks[5:8])) / TICK


def _own_seconds() -> float:
    """Of CPU time that this process and its ended children have used."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)
