"""Checkpoints of a run: written under another name and renamed when complete, read back, pruned."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from sft_recipe.checkpoint.manifest import (
    BEST,
    Files,
    compare,
    fingerprints,
    list_files,
    read_manifest,
    write_manifest,
)
from sft_recipe.display import byte_size
from sft_recipe.errors import CheckpointError
from sft_recipe.files import sync, sync_all

T = TypeVar("T")


def check_free_space(folder: Path, size: int) -> None:
    """Raise OSError where the disk of `folder` has less than `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"the disk is too full: about {byte_size(size)} are needed and {byte_size(free)} are free")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the step_N folders, oldest step first."""
    matches = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.glob("step_*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


class Checkpoints:
    """The checkpoints of one run in `folder`. Every rank makes one, and `save` is collective.

    The newest `keep` stay (all where it is None), and beside them the best evaluated one, which the link `best` names,
    and `resumed`, which this run started from. Ranks communicate on `group`, a gloo group that nothing else uses while
    a save runs.
    """

    def __init__(self, folder: Path, keep: int | None, resumed: Path | None, group: dist.ProcessGroup | None = None):
        self.folder = folder
        self.keep = keep
        self.resumed = resumed
        self.group = group
        if dist.get_rank() == 0:
            _remove_leftovers(folder)
            self._link_best()

    def best(self) -> Path | None:
        """Return the link to the best evaluated checkpoint, or None where none was evaluated."""
        link = self.folder / BEST
        return link if link.is_dir() else None

    def save(
        self,
        step: int,
        size: int,
        metadata: dict[str, Any],
        write: Callable[[Path], Files],
        record: Callable[[], None],
    ) -> Path:
        """Save a checkpoint of about `size` bytes as step_N. Returns its folder.

        `write` is collective and fills the folder that it is given; the folder gets its name when it is complete and
        on the disk. It returns the files that this rank has written, which must be there in the end.
        `metadata` goes into the manifest. `record` writes the run's metrics to the disk first.
        Raises CheckpointError on all ranks where the checkpoint cannot be written, such as on a full disk; earlier
        checkpoints stay.
        """
        final, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"
        try:
            self._run_on_rank0(lambda: self._make_empty(partial, size))
            written: dict[str, list | None] = {}
            self._run_on_all_ranks(lambda: written.update(_write_into(partial, write)))
            files = self._sync(partial, written)
            self._run_on_rank0(lambda: self._commit(partial, final, metadata, files, record))
        except _SaveFailed as failure:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self._gather(None)  # no rank ends the run before that
            reason = re.sub(PINNED, str(partial), str(failure))
            raise CheckpointError(f"step {step} cannot be saved to {self.folder}: {reason}") from None
        return final

    def add(self, checkpoint: Path, write: Callable[[Path], Any]) -> None:
        """Add the folders that `write` creates in an empty folder to a complete checkpoint; on one rank.

        Raises OSError, and what `write` raises.
        """
        partial = self.folder / f".{checkpoint.name}.partial"
        self._make_empty(partial, 0)
        _write_into(partial, write)
        sync_all(path for path in partial.rglob("*") if path.exists())
        for path in partial.iterdir():
            shutil.rmtree(checkpoint / path.name, ignore_errors=True)
            path.rename(checkpoint / path.name)
        metadata = {key: value for key, value in read_manifest(checkpoint).items() if key != "files"}
        write_manifest(checkpoint, metadata, fingerprints(checkpoint, list_files(checkpoint)))

    def _make_empty(self, partial: Path, size: int) -> None:
        _remove_leftovers(self.folder)
        check_free_space(self.folder, size)
        partial.mkdir()  # not its parents: a folder that has vanished must not come back as an empty one

    def _sync(self, partial: Path, written: dict[str, list | None]) -> dict[str, list]:
        """Bring all files to the disk, and return their fingerprints.

        The files are those that rank 0 lists and those that any rank has written: on a network file system a listing
        may be older than the newest files. Each rank syncs its own, since no other can, and reads every n-th of those
        whose fingerprint is not known, such as the exported model.
        """
        listed: dict[str, list | None] = {}
        self._run_on_rank0(lambda: listed.update(dict.fromkeys(list_files(partial))))
        own = listed | written
        parts = self._gather(own)
        known = {name: found for part in parts for name, found in part.items() if found}
        unknown = sorted(set().union(*parts) - known.keys())
        read: dict[str, list] = {}

        def read_and_sync() -> None:
            read.update(fingerprints(partial, unknown[dist.get_rank() :: dist.get_world_size()]))
            sync_all(partial / name for name in own)

        self._run_on_all_ranks(read_and_sync)
        return known | {name: found for part in self._gather(read) for name, found in part.items()}

    def read_back(self, checkpoint: Path) -> None:
        """Compare a complete checkpoint with what was written, and then remove those that are not kept; collective.

        Each rank reads every n-th file, from the disk rather than from memory. Raises CheckpointError on all ranks
        where one differs or cannot be read: the earlier checkpoints stay, and one that differs gets another name.
        """
        damage, problem = "", ""
        try:
            with _pinned(checkpoint) as path:
                files = sorted(read_manifest(path)["files"].items())
                damage = compare(path, dict(files[dist.get_rank() :: dist.get_world_size()]), from_disk=True)
        except (OSError, ValueError, CheckpointError) as error:
            problem = re.sub(PINNED, str(checkpoint), str(error))
        damages, problems = zip(*self._gather((damage, problem)), strict=True)
        if dist.get_rank() == 0:
            with suppress(OSError):
                if any(damages):
                    quarantine(checkpoint)
                    self._link_best()
                elif not any(problems):
                    self._prune(checkpoint)
        if found := [text for text in (*damages, *problems) if text]:
            raise CheckpointError(f"{checkpoint} is not as it was written: {found[0]}")

    def _gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _commit(
        self, partial: Path, final: Path, metadata: dict[str, Any], files: dict[str, list], record: Callable[[], None]
    ) -> None:
        sync_all(path for path in partial.rglob("*") if path.is_dir())
        write_manifest(partial, metadata, files)
        sync(partial)
        record()
        partial.rename(final)
        sync(self.folder)
        self._link_best()

    def _link_best(self) -> None:
        """Let `best` name the best evaluated checkpoint; it is replaced, so that it always names a complete one."""
        link, partial = self.folder / BEST, self.folder / f".{BEST}.partial"
        with suppress(OSError, CheckpointError):  # not on all file systems; the next save tries again
            partial.unlink(missing_ok=True)
            if best := _best(list_checkpoints(self.folder)):
                partial.symlink_to(best.name)
                partial.replace(link)

    def _prune(self, newest: Path) -> None:
        if self.keep is None:
            return
        with suppress(OSError, CheckpointError):  # the next save tries again
            checkpoints = list_checkpoints(self.folder)
            keep = {*checkpoints[-self.keep :], newest, self.resumed, _best(checkpoints)}
            for path in checkpoints:
                if path not in keep:
                    _remove(path)

    def _run_on_rank0(self, act: Callable[[], None]) -> None:
        self._run_on_all_ranks(act if dist.get_rank() == 0 else lambda: None)

    def _run_on_all_ranks(self, act: Callable[[], None]) -> None:
        """Run `act` on all ranks. Where it fails on one, all raise _SaveFailed."""
        problem = None
        try:
            act()
        except (OSError, SafetensorError) as error:
            problem = str(error) or type(error).__name__
        except CheckpointException as error:
            problem = first_failure(error)
        if failed := [text for text in self._gather(problem) if text]:
            raise _SaveFailed(failed[0])


class _SaveFailed(Exception):
    """Holds the problem of the first rank that failed."""


PINNED = r"/proc/\d+/fd/\d+"  # a path of `_pinned`


def _write_into(folder: Path, write: Callable[[Path], T]) -> T:
    with _pinned(folder) as path:
        return write(path)


@contextmanager
def _pinned(folder: Path) -> Iterator[Path]:
    """Give a path that means this very folder, even after it was renamed or removed.

    The libraries that write into it create missing parents: by its name, they would bring back a run folder that has
    vanished. In a removed folder Linux lets nobody create anything, so that they fail instead.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def first_failure(error: CheckpointException) -> str:
    """Return the last line of the first rank's failure, which torch's checkpointing wraps with the others."""
    cause = str(next(iter(error.failures.values()))[0]).strip()
    return cause.splitlines()[-1] if cause else str(error)


def _best(checkpoints: list[Path]) -> Path | None:
    """The best evaluated one, by the metric that the newest of them was compared by."""
    evaluations = {}
    for path in checkpoints:
        with suppress(ValueError, KeyError):
            if (found := _evaluation(path)) and found["value"] is not None:
                evaluations[path] = found
    compared = [(found["metric"], found["mode"]) for found in evaluations.values()][-1:]
    values = {
        path: found["value"] for path, found in evaluations.items() if (found["metric"], found["mode"]) in compared
    }
    sign = -1 if compared and compared[0][1] == "max" else 1
    return min(values, key=lambda path: sign * values[path], default=None)


def _evaluation(checkpoint: Path) -> dict[str, Any] | None:
    """What a manifest says about the checkpoint's evaluation; older ones have the validation loss only."""
    manifest = read_manifest(checkpoint)
    if "validation_loss" in manifest:
        return {"metric": "val/loss", "mode": "min", "value": manifest["validation_loss"]}
    return manifest["evaluation"]


def quarantine(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that is free, since a folder called step_N is complete. Returns its new path."""
    name, numbers = f"damaged_{checkpoint.name}", count(2)
    path = checkpoint.with_name(name)
    while os.path.lexists(path):
        path = checkpoint.with_name(f"{name}_{next(numbers)}")
    return checkpoint.rename(path)


def _remove(checkpoint: Path) -> None:
    """Rename, then remove: a folder called step_N is never incomplete."""
    pruned = checkpoint.with_name(f".{checkpoint.name}.pruned")
    shutil.rmtree(pruned, ignore_errors=True)
    checkpoint.rename(pruned)
    shutil.rmtree(pruned, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals left behind that failed or were killed."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
