"""Saving while training continues: the background thread, its retries after a failure, and what each save costs."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from sft_recipe.checkpoint.manager import Checkpoints, check_free_space
from sft_recipe.checkpoint.state import FsdpState, MegatronState
from sft_recipe.errors import CheckpointError, first_line

STATE = "state"  # a checkpoint's folder of weights and optimizer state
MEMORY_MARGIN = 1.25  # times the size of the copies must be free for them


@dataclass(frozen=True)
class Export:
    """Writes the model of a stored state (first path) into a folder (second path); `size` is about its bytes."""

    write: Callable[[Path, Path], None]
    size: int

    def attempt(self, folder: Path) -> str:
        """Write the model beside the state in a checkpoint's folder. Returns why that failed, or an empty text.

        Where it failed, whatever the reason, the folder has the state only: that is what training resumes from.
        """
        try:
            check_free_space(folder, self.size)
            self.write(folder / STATE, folder)
        except Exception as error:
            for path in folder.iterdir():
                if path.name != STATE:
                    shutil.rmtree(path, ignore_errors=True)
            return first_line(error)
        return ""


class AsyncSaver:
    """Saves a run's checkpoints, one at a time. All ranks call `start` and `wait` after the same steps.

    With `overlap`, and where memory allows, the state is copied to host memory, and a thread writes it while training
    continues. A save that fails is reported and retried 1, 2, 4, ... steps later; training continues meanwhile.
    `record` writes the run's metrics to the disk; `say` prints a message.

    `timings` has two durations in seconds for each complete save: until it was complete, and how long it blocked
    training. `newest` is the checkpoint that a resume would take; `retry_at` the step of the next retry, if any.
    `export_problem` is, on rank 0, why the newest checkpoint has no exported model; empty where it has one.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        state: FsdpState | MegatronState,
        export: Export,
        record: Callable[[], None],
        say: Callable[[str], None],
        overlap: bool,
    ):
        self.checkpoints = checkpoints
        self.state = state
        self.export = export
        self.record = record
        self.say = say
        self.overlap = overlap and state.supports_copy
        self.memory_checked = False
        self.timings: list[tuple[float, float]] = []
        self.problem: CheckpointError | None = None  # of the newest save
        self.export_problem = ""
        self.newest = checkpoints.resumed
        self.failures = 0  # in a row, up to the newest save
        self.retry_at: int | None = None
        self._job: _Job | None = None

    def start(self, step: int, metadata: dict[str, Any]) -> None:
        """Save the state after `step`, and wait for it unless saves overlap; `metadata` goes into the manifest."""
        self.wait(step)
        self.retry_at = None
        began = time.perf_counter()
        size = self.state.size()
        write_state = self.state.stage(copy=self.overlap and self._has_memory_for_copies(size))
        needed = self._sum(size)

        def write(folder: Path) -> set[str]:
            written = write_state(folder / STATE)
            if dist.get_rank() == 0:
                self.export_problem = self.export.attempt(folder)
            return {f"{STATE}/{name}" for name in written}

        self._job = _Job(lambda: self.checkpoints.save(step, needed, metadata, write, self.record), began)
        if self.overlap:
            self._job.run_in_background()
        else:
            self.wait(step)

    def has_failed(self) -> bool:
        """Return whether the running save has failed, as far as this rank knows; others may notice a moment later."""
        return self._job is not None and self._job.has_failed()

    def poll(self, step: int) -> None:
        """Report a save that has succeeded meanwhile; not collective."""
        if self._job is not None and self._job.has_succeeded():
            self.wait(step)

    def wait(self, step: int) -> None:
        """Wait until the running save has ended, and report how; sets `problem` where it failed."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            path = job.result()
        except CheckpointError as error:
            self.problem = error
            self.retry_at, self.failures = step + 2**self.failures, self.failures + 1
            self.say(f"WARNING: {error}. Training continues; the next try is after step {self.retry_at}.")
            return
        self.problem, self.retry_at, self.failures = None, None, 0
        self.timings.append((job.seconds, job.stall))
        self.newest = path
        self.say(f"saved {path} in {job.seconds:.1f} s (training blocked {job.stall:.1f} s)")
        if self.export_problem:
            self.say(
                f"WARNING: the model of {path.name} cannot be exported: {self.export_problem}. Its state is saved, and "
                "training can be resumed from it; the next save tries again."
            )

    def close(self, step: int) -> None:
        """Wait for the last save. Raises CheckpointError where it failed, since its state is not on the disk."""
        self.wait(step)
        if self.problem:
            raise CheckpointError(
                f"{self.problem}. The run ends without this state; earlier checkpoints are complete: once the problem "
                "is solved, continue from the newest with --resume_from auto."
            )

    def export_again(self, checkpoint: Path) -> None:
        """Export the model of a complete checkpoint of this run; on rank 0. Sets `export_problem` where that fails."""
        try:
            self.checkpoints.add(checkpoint, lambda folder: self.export.write(checkpoint / STATE, folder))
        except Exception as error:
            self.export_problem = first_line(error)

    def timings_since(self, count: int) -> dict[str, float]:
        """Return the metrics of all saves except the first `count`; empty where there are none."""
        saves = self.timings[count:]
        took, blocked = (sum(save[part] for save in saves) for part in (0, 1))
        return {"perf/save_s": round(took, 4), "perf/save_wait_s": round(blocked, 4)} if saves else {}

    def _has_memory_for_copies(self, size: int) -> bool:
        """Checked before the first copy, whose memory is reused. Where one rank has too little, none copies."""
        if not self.memory_checked:
            self.memory_checked = True
            needed = MEMORY_MARGIN * size * int(os.environ["LOCAL_WORLD_SIZE"])
            self.overlap = self._sum(int(psutil.virtual_memory().available < needed)) == 0
            if not self.overlap:
                self.say("There is too little memory to save while training continues: saving blocks it (async_save).")
        return self.overlap

    def _sum(self, number: int) -> int:
        """The sum over all ranks."""
        total = torch.tensor([number])
        dist.all_reduce(total, group=self.checkpoints.group)
        return int(total.item())


class _Job:
    """One save, which runs in the background after `run_in_background`, else inside `result`."""

    def __init__(self, act: Callable[[], Path], began: float):
        self.act = act
        self.began = began
        self.seconds = 0.0
        self.stall = 0.0
        self._outcome: Path | Exception | None = None
        self._thread: threading.Thread | None = None

    def run_in_background(self) -> None:
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)
        self._thread.start()
        self.stall = time.perf_counter() - self.began

    def has_failed(self) -> bool:
        return isinstance(self._outcome, Exception)

    def has_succeeded(self) -> bool:
        return isinstance(self._outcome, Path)

    def result(self) -> Path:
        """Waits, and returns the checkpoint's folder or raises what the save raised."""
        since = time.perf_counter() if self._thread else self.began
        if self._thread:
            self._thread.join()
        else:
            self._run()
        self.stall += time.perf_counter() - since
        if isinstance(self._outcome, Path):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self.act()
        except Exception as error:
            self._outcome = error
        self.seconds = time.perf_counter() - self.began
