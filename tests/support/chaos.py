"""Kill a run repeatedly, in every phase, and resume it until it completes."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.warm import Warm

MAX_KILL_DELAY_S = 6.0  # a kill at a random time comes at most this long after the start


def send_signal_at(rank: int, phase: str, on_rank: int, call: int, sends: int = signal.SIGKILL, times: int = 1) -> None:
    """Send a signal when `on_rank` reaches `phase` for the `call`-th time (from 1); a setup for Warm.run.

    SIGKILL goes to all ranks at once, any other signal to that rank only.
    """
    calls = 0

    def act() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            for _ in range(times):
                os.kill(0 if sends == signal.SIGKILL else os.getpid(), sends)

    if rank == (0 if phase in FIRST_RANK_ONLY else on_rank):
        PHASES[phase](act)


def wrap(owner: Any, name: str, before: Callable[..., None] = lambda *_: None, after: Any = lambda *_: None) -> None:
    """Call `before` and `after` around a function, with its arguments."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        result = real(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapped)


def _in_data_build(die: Callable[[], None]) -> None:
    """Die when one file of the token store is written and others are not."""

    def dying(file: int) -> None:
        if "/tokens/" in os.readlink(f"/proc/self/fd/{file}"):
            die()

    wrap(os, "fsync", before=dying)


def _in_resuming(die: Callable[[], None]) -> None:
    from sft_recipe.checkpoint import state

    wrap(state, "restore_tied", before=lambda *_: die())


def _in_dropping_rows(die: Callable[[], None]) -> None:
    wrap(Path, "replace", before=lambda path, _: die() if path.name.startswith(".metrics.jsonl.") else None)


def _in_forward(die: Callable[[], None]) -> None:
    """Not in the checks of the model before the first step, which compute no gradients."""
    import torch

    from sft_recipe.engine.sft_engine import SFTEngine

    wrap(SFTEngine, "micro_batch_loss", after=lambda *_: die() if torch.is_grad_enabled() else None)


def _in_optimizer_step(die: Callable[[], None]) -> None:
    from sft_recipe.engine.sft_engine import SFTEngine

    wrap(SFTEngine, "optimizer_step", after=lambda *_: die())


def _in_row(die: Callable[[], None]) -> None:
    """Die with half a row in the file."""
    from sft_recipe.tracking.metrics_file import MetricsFile

    def half(file: MetricsFile) -> None:
        with file.path.open("ab") as raw:
            raw.write(file.waiting[: len(file.waiting) // 2])
        die()

    wrap(MetricsFile, "flush", before=half)


def _in_validation(die: Callable[[], None]) -> None:
    from sft_recipe.evaluation import evaluator

    def dying(evaluate: Any) -> Any:
        def evaluating(examples: Any, budget: int, ranks: int, make: Any, infer: Any, progress: Any) -> Any:
            return evaluate(examples, budget, ranks, make, lambda batch: (infer(batch), die())[0], progress)

        return evaluating

    evaluator.evaluate = dying(evaluator.evaluate)


def _in_shards(die: Callable[[], None]) -> None:
    from sft_recipe.checkpoint.writer import ShardWriter

    wrap(ShardWriter, "write_data", after=lambda *_: die())


def _in_export(die: Callable[[], None]) -> None:
    """Die when the model is written and its tokenizer is not; the trial before the first step goes elsewhere."""
    from sft_recipe.export.huggingface import ModelSaver

    wrap(ModelSaver, "_save_settings", before=lambda _, target: die() if target.is_relative_to("/proc") else None)


def _before_manifest(die: Callable[[], None]) -> None:
    from sft_recipe.checkpoint import manager as checkpoint

    wrap(checkpoint, "write_manifest", before=lambda *_: die())


def _before_rename(die: Callable[[], None]) -> None:
    wrap(Path, "rename", before=lambda path, _: die() if _is_partial(path) else None)


def _after_rename(die: Callable[[], None]) -> None:
    wrap(Path, "rename", after=lambda path, _: die() if _is_partial(path) else None)


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".step_") and path.name.endswith(".partial")


def _in_retention(die: Callable[[], None]) -> None:
    """Die when one file of a pruned checkpoint is removed."""

    def half(folder: Any, *_: Any) -> None:
        folder = Path(folder)
        if folder.name.endswith(".pruned") and folder.is_dir():
            next(folder.rglob("*.safetensors")).unlink()
            die()

    wrap(shutil, "rmtree", before=half)


# In an order in which a run that dies once in each phase reaches all of them.
PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "data build": _in_data_build,
    "dropping rows": _in_dropping_rows,
    "forward": _in_forward,
    "optimizer step": _in_optimizer_step,
    "writing a row": _in_row,
    "after the rename": _after_rename,
    "resuming": _in_resuming,
    "shards": _in_shards,
    "export": _in_export,
    "manifest": _before_manifest,
    "before the rename": _before_rename,
    "validation": _in_validation,
    "retention": _in_retention,
}
ONCE = {"dropping rows", "resuming", "validation", "retention"}  # a process reaches these at most once
FIRST_RANK_ONLY = {
    "data build", "dropping rows", "writing a row", "export", "manifest", "before the rename", "after the rename",
    "retention",
}  # fmt: skip
RANDOM_TIME = "random time"


@dataclass
class KillReport:
    """What happened to a sequence of killed and resumed runs."""

    kills: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    resumed: int = 0  # attempts that began from a checkpoint
    differences: list[str] = field(default_factory=list)
    seconds_to_first_step: list[float] = field(default_factory=list)  # of the attempts that reached it

    @property
    def count(self) -> int:
        return sum(self.kills.values())


def kill_schedule(seed: int) -> Iterator[dict[str, Any]]:
    """Yield the arguments of Warm.run for one kill after another: once in every phase, then anywhere."""
    rng = random.Random(seed)
    for phase in PHASES:
        yield _kill(rng, phase, calls=1)
    while True:
        phase = rng.choice([*PHASES, RANDOM_TIME, RANDOM_TIME, RANDOM_TIME])
        if phase == RANDOM_TIME:
            yield {"kill_after": rng.uniform(0.1, MAX_KILL_DELAY_S)}
        else:
            yield _kill(rng, phase, calls=3)


def _kill(rng: random.Random, phase: str, calls: int) -> dict[str, Any]:
    call = 1 if phase in ONCE else rng.randint(1, calls)
    return {
        "setup": ("tests.support.chaos:send_signal_at", {"phase": phase, "on_rank": rng.randrange(2), "call": call})
    }


def kill_and_resume(
    warm: Warm, arguments: list[str], uninterrupted: Path, folder: Path, seed: int, limit: int, ranks: int = 2
) -> KillReport:
    """Kill and resume the run of `arguments` in `folder` until it was killed `limit` times; then let it complete.

    A run that completes earlier is compared with the one in `uninterrupted`, removed, and started again.
    """
    report, kills = KillReport(), kill_schedule(seed)
    while True:
        kill = next(kills) if report.count < limit else {}
        end = warm.run([*arguments, "trainer.resume_from=auto"], ranks=ranks, **kill)
        report.resumed += "resumed" in end.output
        if end.seconds_to_first_step is not None:
            report.seconds_to_first_step.append(end.seconds_to_first_step)
        if end.code == -signal.SIGKILL:
            phase = kill["setup"][1]["phase"] if "setup" in kill else RANDOM_TIME
            report.kills[phase] = report.kills.get(phase, 0) + 1
        elif end.code == 0:
            report.runs += 1
            report.differences += differences(uninterrupted, folder)
            if report.count >= limit:
                return report
            shutil.rmtree(folder)
        else:
            raise AssertionError(f"{kill} ended with {end.codes}:\n{end.output}")


def deterministic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without measurements of time and memory."""
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def states(checkpoint: Path) -> dict[tuple[str, str], Any]:
    """Return every tensor of the weights and the optimizer, by shard and name."""
    from safetensors.torch import load_file

    files = sorted((checkpoint / "state").glob("*.safetensors"))
    return {(file.name, name): value for file in files for name, value in load_file(file).items()}


def differences(first: Path, second: Path) -> list[str]:
    """Return what differs, bit for bit, between two run folders: metrics, weights, optimizer, or exported model."""
    found = []
    rows = [
        deterministic([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
        for run in (first, second)
    ]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    last = f"checkpoints/step_{rows[0][-1]['step']}"
    left, right = states(first / last), states(second / last)
    if left.keys() != right.keys() or not any("exp_avg_sq" in name for _, name in left):
        return [*found, "names of the state"]
    found += [f"state {key}" for key, value in left.items() if not value.equal(right[key])]
    for path in (first / last / "huggingface").iterdir():
        if path.read_bytes() != (second / last / "huggingface" / path.name).read_bytes():
            found.append(path.name)
    return found
