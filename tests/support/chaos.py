"""Kills a run again and again, in every phase of its life, and resumes it until it is done."""

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

LONGEST = 6.0  # seconds after which a kill by the clock comes at the latest


def strike(rank: int, phase: str, on_rank: int, call: int, sends: int = signal.SIGKILL, times: int = 1) -> None:
    """A setup for Warm.run: a signal where `on_rank` comes to `phase` for the `call`-th time (from 1).

    SIGKILL is for all ranks at once, another one for that rank alone.
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


def _wrap(owner: Any, name: str, before: Callable[..., None] = lambda *_: None, after: Any = lambda *_: None) -> None:
    """Call `before` and `after` around a function, with its arguments."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        result = real(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapped)


def _in_data_build(die: Callable[[], None]) -> None:
    """With a file of the token store written, and others not."""

    def dying(file: int) -> None:
        if "/tokens/" in os.readlink(f"/proc/self/fd/{file}"):
            die()

    _wrap(os, "fsync", before=dying)


def _in_resuming(die: Callable[[], None]) -> None:
    from sft_recipe.checkpoint import state

    _wrap(state, "restore_tied", before=lambda *_: die())


def _in_dropping_rows(die: Callable[[], None]) -> None:
    _wrap(Path, "replace", before=lambda path, _: die() if path.name == "metrics.partial" else None)


def _in_forward(die: Callable[[], None]) -> None:
    from sft_recipe.engine.sft_engine import SFTEngine

    _wrap(SFTEngine, "_loss", after=lambda *_: die())


def _in_optimizer_step(die: Callable[[], None]) -> None:
    from sft_recipe.engine.sft_engine import SFTEngine

    _wrap(SFTEngine, "optimizer_step", after=lambda *_: die())


def _in_row(die: Callable[[], None]) -> None:
    """With half a row in the file."""
    from sft_recipe.tracking.run_log import RowFile

    def half(file: RowFile) -> None:
        with file.path.open("ab") as raw:
            raw.write(file.waiting[: len(file.waiting) // 2])
        die()

    _wrap(RowFile, "flush", before=half)


def _in_validation(die: Callable[[], None]) -> None:
    from sft_recipe.training import trainer

    def dying(evaluate: Any) -> Any:
        def evaluating(examples: Any, budget: int, ranks: int, make: Any, infer: Any, progress: Any) -> Any:
            return evaluate(examples, budget, ranks, make, lambda batch: (infer(batch), die())[0], progress)

        return evaluating

    trainer.evaluate = dying(trainer.evaluate)


def _in_shards(die: Callable[[], None]) -> None:
    from sft_recipe.checkpoint.state import HuggingFaceStorageWriter

    _wrap(HuggingFaceStorageWriter, "write_data", after=lambda *_: die())


def _in_export(die: Callable[[], None]) -> None:
    from sft_recipe.export.huggingface import ModelSaver

    _wrap(ModelSaver, "_generation_config", before=lambda *_: die())


def _before_manifest(die: Callable[[], None]) -> None:
    from sft_recipe.checkpoint import manager as checkpoint

    _wrap(checkpoint, "write_manifest", before=lambda *_: die())


def _before_rename(die: Callable[[], None]) -> None:
    _wrap(Path, "rename", before=lambda path, _: die() if _is_partial(path) else None)


def _after_rename(die: Callable[[], None]) -> None:
    _wrap(Path, "rename", after=lambda path, _: die() if _is_partial(path) else None)


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".step_") and path.name.endswith(".partial")


def _in_retention(die: Callable[[], None]) -> None:
    """With one file of a retired checkpoint gone."""

    def half(folder: Path, *_: Any) -> None:
        if folder.name.endswith(".retired") and folder.is_dir():
            next(folder.rglob("*.safetensors")).unlink()
            die()

    _wrap(shutil, "rmtree", before=half)


# In an order in which a run that dies once in each meets all of them.
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
ONCE = {"dropping rows", "resuming", "validation", "retention"}  # at most, in the life of a process
FIRST_RANK_ONLY = {
    "data build", "dropping rows", "writing a row", "export", "manifest", "before the rename", "after the rename",
    "retention",
}  # fmt: skip
BY_THE_CLOCK = "at any moment"


@dataclass
class Survived:
    """What runs went through until the last of them was done."""

    kills: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    resumed: int = 0  # attempts that began from a checkpoint
    differences: list[str] = field(default_factory=list)
    seconds_to_first_step: list[float] = field(default_factory=list)  # of those that came so far

    @property
    def count(self) -> int:
        return sum(self.kills.values())


def plan(seed: int) -> Iterator[dict[str, Any]]:
    """Keyword arguments of Warm.run for one kill after the other: in every phase once, then anywhere."""
    dice = random.Random(seed)
    for phase in PHASES:
        yield _kill(dice, phase, calls=1)
    while True:
        phase = dice.choice([*PHASES, BY_THE_CLOCK, BY_THE_CLOCK, BY_THE_CLOCK])
        if phase == BY_THE_CLOCK:
            yield {"kill_after": dice.uniform(0.1, LONGEST)}
        else:
            yield _kill(dice, phase, calls=3)


def _kill(dice: random.Random, phase: str, calls: int) -> dict[str, Any]:
    call = 1 if phase in ONCE else dice.randint(1, calls)
    return {"setup": ("tests.support.chaos:strike", {"phase": phase, "on_rank": dice.randrange(2), "call": call})}


def survive(
    warm: Warm, arguments: list[str], whole: Path, folder: Path, seed: int, limit: int, ranks: int = 2
) -> Survived:
    """Kill the run of `arguments` in `folder` until that was done `limit` times, resuming it with auto; let it end.

    A run that ends before is compared with the one in `whole`, removed, and started anew.
    """
    survived, kills = Survived(), plan(seed)
    while True:
        kill = next(kills) if survived.count < limit else {}
        end = warm.run([*arguments, "trainer.resume_from=auto"], ranks=ranks, **kill)
        survived.resumed += "resumed" in end.said
        if end.seconds_to_first_step is not None:
            survived.seconds_to_first_step.append(end.seconds_to_first_step)
        if end.code == -signal.SIGKILL:
            phase = kill["setup"][1]["phase"] if "setup" in kill else BY_THE_CLOCK
            survived.kills[phase] = survived.kills.get(phase, 0) + 1
        elif end.code == 0:
            survived.runs += 1
            survived.differences += differences(whole, folder)
            if survived.count >= limit:
                return survived
            shutil.rmtree(folder)
        else:
            raise AssertionError(f"{kill} ended with {end.codes}:\n{end.said}")


def deterministic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock and the machine decide."""
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def states(checkpoint: Path) -> dict[tuple[str, str], Any]:
    """Every tensor of weights and optimiser, by shard and name."""
    from safetensors.torch import load_file

    files = sorted((checkpoint / "state").glob("*.safetensors"))
    return {(file.name, name): value for file in files for name, value in load_file(file).items()}


def differences(one: Path, other: Path) -> list[str]:
    """Between two run folders: in metrics, in weights and optimiser, and in the model for others; bit for bit."""
    found = []
    rows = [
        deterministic([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
        for run in (one, other)
    ]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    last = f"checkpoints/step_{rows[0][-1]['step']}"
    left, right = states(one / last), states(other / last)
    if left.keys() != right.keys() or not any("exp_avg_sq" in name for _, name in left):
        return [*found, "names of the state"]
    found += [f"state {key}" for key, value in left.items() if not value.equal(right[key])]
    for path in (one / last / "huggingface").iterdir():
        if path.read_bytes() != (other / last / "huggingface" / path.name).read_bytes():
            found.append(path.name)
    return found
