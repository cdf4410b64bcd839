"""When a checkpoint is written, whether training waits for it, what that costs, and what happens where it fails."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from sft_recipe.checkpoint.manager import Checkpoints
from sft_recipe.checkpoint.state import FsdpState, MegatronState
from sft_recipe.errors import CheckpointError

STATE = "state"  # a checkpoint's folder of weights and optimiser
SPARE = 1.25  # times the memory that copies take must be free for them


@dataclass(frozen=True)
class Export:
    """What a checkpoint holds beside the state: written by rank 0 from the stored state; about so many bytes."""

    write: Callable[[Path], None]
    size: int


class AsyncSaver:
    """Takes a run's checkpoints, one at a time. All ranks call `start` and `wait` after the same steps.

    With `overlap`, and where memory allows, the state is copied to host memory, and a thread writes it while training
    goes on. A save that fails is told, and is due again 1, 2, 4, ... steps later; training goes on meanwhile.
    `record` puts the run's metrics on disk; `say` tells a person.
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
        self.timings: list[tuple[float, float]] = []  # of each save, in seconds: until it was whole, and standing still
        self.problem: CheckpointError | None = None  # of the newest save
        self.newest = checkpoints.resumed  # the checkpoint that a resume would take
        self.failures = 0  # of the newest saves, in a row
        self.retry_at: int | None = None
        self._job: _Job | None = None

    def start(self, step: int, metadata: dict[str, Any]) -> None:
        """Save the state as it is now, after `step`; `about` goes into the manifest."""
        self.wait(step)
        self.retry_at = None
        began = time.perf_counter()
        size = self.state.size()
        write_state = self.state.stage(copy=self.overlap and self._has_memory_for_copies(size))
        needed = self._sum(size) + self.export.size

        def write(folder: Path) -> None:
            write_state(folder / STATE)
            if dist.get_rank() == 0:
                self.export.write(folder)

        self._job = _Job(lambda: self.checkpoints.save(step, needed, metadata, write, self.record), began)
        if self.overlap:
            self._job.run_in_background()
        else:
            self.wait(step)

    def has_failed(self) -> bool:
        """Whether the save under way failed, as far as this rank knows; the others may hear of it a moment later."""
        return self._job is not None and self._job.has_failed()

    def poll(self, step: int) -> None:
        """Tell of a save that has ended well meanwhile; each rank for itself."""
        if self._job is not None and self._job.has_succeeded():
            self.wait(step)

    def wait(self, step: int) -> None:
        """Until the save that is under way has ended one way or the other; sets `problem` where it failed."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            path = job.result()
        except CheckpointError as error:
            self.problem = error
            self.retry_at, self.failures = step + 2**self.failures, self.failures + 1
            self.say(f"WARNING: {error}. Training goes on; the next try is after step {self.retry_at}.")
            return
        self.problem, self.retry_at, self.failures = None, None, 0
        self.timings.append((job.seconds, job.stall))
        self.newest = path
        self.say(f"saved {path} ({job.seconds:.1f} s, of which training waited {job.stall:.1f} s)")

    def close(self, step: int) -> None:
        """Wait for the last save. Raises CheckpointError where it failed: this state is not on the disk."""
        self.wait(step)
        if self.problem:
            raise CheckpointError(
                f"{self.problem}. The run ends without this state; what was saved before is whole: go on from it with "
                "--resume_from auto when that is mended."
            )

    def timings_since(self, seen: int) -> dict[str, float]:
        """Of all saves but the first `seen`, for a row of metrics; empty where there are none."""
        took, waited = (sum(save[part] for save in self.timings[seen:]) for part in (0, 1))
        return {"perf/save_s": round(took, 4), "perf/save_wait_s": round(waited, 4)} if self.timings[seen:] else {}

    def _has_memory_for_copies(self, size: int) -> bool:
        """Asked once: from then on the memory is held. Where one rank has no room, none copies."""
        if not self.memory_checked:
            self.memory_checked = True
            needed = SPARE * size * int(os.environ["LOCAL_WORLD_SIZE"])
            self.overlap = self._sum(int(psutil.virtual_memory().available < needed)) == 0
            if not self.overlap:
                self.say("There is too little memory to save while training goes on: it will wait (async_save).")
        return self.overlap

    def _sum(self, number: int) -> int:
        """Over all ranks."""
        total = torch.tensor([number])
        dist.all_reduce(total, group=self.checkpoints.group)
        return int(total.item())


class _Job:
    """One save: in the background once that is asked for, else when its result is."""

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
        """Raises what the saving raised."""
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
