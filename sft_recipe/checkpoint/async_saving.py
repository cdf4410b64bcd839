"""Saving while training continues: the background thread, its retries after a failure, and what each save costs."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_recipe.checkpoint.manager import Checkpoints, check_free_space
from sft_recipe.checkpoint.manifest import Files
from sft_recipe.checkpoint.state import FsdpState, MegatronState
from sft_recipe.distributed.host_memory import available_memory
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
    continues. In any case a complete checkpoint is read back while training continues. A save that fails is reported
    and retried 1, 2, 4, ... steps later, at the latest after `last_step`; training continues meanwhile.
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
        last_step: int,
    ):
        self.checkpoints = checkpoints
        self.state = state
        self.export = export
        self.record = record
        self.say = say
        self.last_step = last_step
        self.overlap = overlap and state.supports_copy
        self.memory_checked = False
        self.timings: list[tuple[float, float]] = []
        self.problem: CheckpointError | None = None  # of the newest save
        self.export_problem = ""
        self.newest = checkpoints.resumed
        self.failures = 0  # in a row, up to the newest save
        self.retry_at: int | None = None
        self._job: _Job | None = None

    def start(self, step: int, metadata: dict[str, Any], is_last: bool = False) -> None:
        """Save the state after `step`, and wait for it unless saves overlap; `metadata` goes into the manifest.

        After the last one, `close` reports a failure.
        """
        self.wait(step, retry_at=step)
        self.retry_at = None
        began = time.perf_counter()
        size = self.state.size()
        write_state = self.state.stage(copy=self.overlap and self._has_memory_for_copies())
        needed = self._sum(size)

        def write(folder: Path) -> Files:
            written = write_state(folder / STATE)
            if dist.get_rank() == 0:
                self.export_problem = self.export.attempt(folder)
            return {f"{STATE}/{name}": fingerprint for name, fingerprint in written.items()}

        save = partial(self.checkpoints.save, step, needed, metadata, write, self.record)
        self._job = _Job(save, self.checkpoints.read_back, began)
        self._job.start(self.overlap)
        if self.overlap:
            return
        if self._job.path:
            self.poll(step)
        elif not is_last:
            self.wait(step)

    def has_failed(self) -> bool:
        """Return whether the running save has failed, as far as this rank knows; others may notice a moment later."""
        return self._job is not None and self._job.error is not None

    def poll(self, step: int) -> None:
        """Report a save whose checkpoint is complete meanwhile; not collective."""
        job = self._job
        if job is None or job.path is None or job.is_reported:
            return
        job.is_reported = True
        self.timings.append((job.seconds, job.stall))
        longer = ", reading it back included" if job.was_awaited and job.stall > job.seconds else ""
        self.say(f"saved {job.path} in {job.seconds:.1f} s (training waited {job.stall:.1f} s{longer})")
        if self.export_problem:
            self.say(
                f"WARNING: the model of {job.path.name} cannot be exported: {self.export_problem}. Its state is saved, "
                "and training can be resumed from it; the next save tries again."
            )

    def wait(self, step: int, retry_at: int | None = None) -> None:
        """Wait until the running save has ended, and report how; where it failed, sets `problem` and `retry_at`.

        The next save is after step `retry_at` where that is known.
        """
        if self._has_ended_well(step):
            return
        next_step = retry_at or self.retry_at
        self.say(f"WARNING: {self.problem}. Training continues; the next try is after step {next_step}.")

    def _has_ended_well(self, step: int) -> bool:
        """Wait until the running save, if any, has ended. Returns whether it has not failed."""
        job = self._job
        if job is None:
            return True
        job.wait()
        self.poll(step)
        self._job = None
        if job.path:
            self.timings[-1] = (job.seconds, job.stall)
        if job.error is None:
            self.problem, self.retry_at, self.failures, self.newest = None, None, 0, job.path
        elif isinstance(job.error, CheckpointError):
            self.problem = job.error
            self.retry_at = min(step + 2**self.failures, self.last_step)
            self.failures += 1
        else:
            raise job.error
        return job.error is None

    def close(self, step: int) -> None:
        """Wait for the last save. Raises CheckpointError where it failed, since its state is not on the disk."""
        self._has_ended_well(step)
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

    def _has_memory_for_copies(self) -> bool:
        """Checked before the first copy, whose memory is reused. Where one rank has too little, none copies.

        The first machine also exports the model meanwhile.
        """
        if not self.memory_checked:
            self.memory_checked = True
            needed = MEMORY_MARGIN * self.state.copies_size() * int(os.environ["LOCAL_WORLD_SIZE"]) + self.export.size
            self.overlap = self._sum(int(available_memory() < needed)) == 0
            if not self.overlap:
                self.say("There is too little memory to save while training continues: saving blocks it (async_save).")
        return self.overlap

    def _sum(self, number: int) -> int:
        """The sum over all ranks."""
        total = torch.tensor([number])
        dist.all_reduce(total, group=self.checkpoints.group)
        return int(total.item())


class _Job:
    """One save: first it writes a checkpoint, which then is complete, and then reads that back in the background.

    `path` is the complete checkpoint; `error` is why there is none, or why it is damaged. `seconds` is how long the
    first part took, `stall` how long training waited for any part.
    """

    def __init__(self, write: Callable[[], Path], read_back: Callable[[Path], None], began: float):
        self.write = write
        self.read_back = read_back
        self.began = began
        self.path: Path | None = None
        self.error: Exception | None = None
        self.is_reported = False
        self.seconds = 0.0
        self.stall = 0.0
        self.was_awaited = False  # until it was read back
        self._thread: threading.Thread | None = None

    def start(self, overlap: bool) -> None:
        """Write the checkpoint, in the background too with `overlap`."""
        if not overlap:
            self._write()
        run = self._write_and_read_back if overlap else self._read_back
        self._thread = threading.Thread(target=run, name="save", daemon=True)
        self._thread.start()
        self.stall = time.perf_counter() - self.began

    def wait(self) -> None:
        """Wait until both parts have ended."""
        self.was_awaited = True
        since = time.perf_counter()
        if self._thread:
            self._thread.join()
        self.stall += time.perf_counter() - since

    def _write_and_read_back(self) -> None:
        self._write()
        self._read_back()

    def _write(self) -> None:
        try:
            path = self.write()
        except Exception as error:
            self.error = error
        else:
            self.seconds = time.perf_counter() - self.began
            self.path = path

    def _read_back(self) -> None:
        try:
            if self.path:
                self.read_back(self.path)
        except Exception as error:
            self.error = error
