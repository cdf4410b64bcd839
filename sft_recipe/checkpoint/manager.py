"""Checkpoints: written under another name and renamed when whole; found, checked, resumed from, and retired."""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from sft_recipe.checkpoint.manifest import (
    MANIFEST,
    fingerprints,
    list_files,
    read_manifest,
    verify,
    write_manifest,
)
from sft_recipe.errors import CheckpointError

AUTO = "auto"


def find_checkpoint(spec: str | None, folder: Path, is_restart: bool, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `trainer.resume_from` means; None for a run that starts from the beginning.

    Every byte of it has been read and found as it was written. `auto` is the newest of `folder`, and so is the first
    choice of a run that was restarted after a failure. Raises CheckpointError: no such folder, not a checkpoint, a
    damaged one.
    """
    if (spec == AUTO or is_restart) and (newest := _newest_valid(folder, say)):
        return newest
    if spec == AUTO:
        say(f"--resume_from auto found no checkpoint in {folder}: training starts from the beginning.")
        return None
    return _named(Path(spec).expanduser()) if spec else None


def _newest_valid(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Newer ones that are damaged are told and set aside under another name: a folder called step_N is whole."""
    for path in reversed(list_checkpoints(folder)):
        if not (found := verify(path)):
            return path
        say(f"{path} is damaged: {found}. It is set aside as {_quarantine(path).name}.")
    return None


def _named(path: Path) -> Path:
    if not path.is_dir():
        there = ", ".join(found.name for found in list_checkpoints(path.parent)) if path.parent.is_dir() else ""
        raise CheckpointError(f"there is no checkpoint {path}" + (f"; beside it stand {there}" if there else ""))
    inner = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inner and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is a folder of checkpoints, not one; name one of them, such as {inner[-1]}")
    if found := verify(path):
        raise CheckpointError(
            f"{path} is no complete checkpoint: {found}. --resume_from auto takes the newest that is whole."
        )
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """step_N folders, oldest step first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def check_identity(checkpoint: Path, ours: dict[str, Any]) -> None:
    """A run continues with the same model, data and batch plan. Raises CheckpointError that names what differs."""
    theirs = read_manifest(checkpoint)["identity"]
    lines = [
        f"  - {key}: {theirs.get(key)} there, {ours.get(key)} here" for key in ours if theirs.get(key) != ours.get(key)
    ]
    if lines:
        message = [f"{checkpoint} belongs to another run; it cannot be continued with this one's settings:", *lines]
        raise CheckpointError(
            "\n".join([*message, "Use the settings of that run, or start anew in another --output_dir."])
        )


def check_run_folder_is_free(folder: Path, resume: Path | None) -> None:
    """A run never overwrites another's checkpoints. Raises CheckpointError that says what is there and what to do."""
    there = list_checkpoints(folder)
    if resume is None and there:
        raise CheckpointError(
            f"{folder} holds {there[-1].name} of an earlier run. Continue it with --resume_from auto, "
            "or write this run elsewhere with --output_dir FOLDER, or remove it."
        )
    if resume is None or resume.parent.resolve() != folder.resolve():
        if there:
            raise CheckpointError(
                f"{folder} holds {there[-1].name} of another run; write this one elsewhere with --output_dir"
            )
        return
    newer = [path.name for path in there if _step(path) > _step(resume)]
    if newer:
        raise CheckpointError(
            f"{folder} holds {', '.join(newer)}, newer than {resume.name}. Continue the newest with --resume_from "
            "auto, or write elsewhere with --output_dir FOLDER, or remove the newer ones."
        )


class Checkpoints:
    """One run's checkpoints in `folder`; every rank makes one, and `save` is collective.

    The newest `keep` stay, and beside them the one with the lowest validation loss and `resumed`, from which this run
    began. Ranks talk to each other on `group`, which must be a gloo group of its own where saving overlaps training.
    """

    def __init__(self, folder: Path, keep: int | None, resumed: Path | None, group: dist.ProcessGroup | None = None):
        self.folder = folder
        self.keep = keep
        self.resumed = resumed
        self.group = group
        if dist.get_rank() == 0:
            _remove_leftovers(folder)

    def save(
        self, step: int, size: int, metadata: dict[str, Any], write: Callable[[Path], None], record: Callable[[], None]
    ) -> Path:
        """Let `write`, which is collective, fill a folder of another name; one rename makes it step_N when it is whole.

        `size` is about how many bytes `write` needs. `about` is what the manifest says besides files. `record` puts
        the run's metrics on disk, which a checkpoint must not be ahead of.
        Raises CheckpointError on all ranks where it cannot be written, such as on a full disk; what was saved before
        stays.
        """
        final, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"
        try:
            self._run_on_rank0(lambda: self._make_empty(partial, size))
            self._run_on_all_ranks(lambda: write(partial))
            files = self._fingerprints(partial)
            self._run_on_rank0(lambda: self._commit(partial, final, metadata, files, record))
        except _SaveFailed as failure:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"step {step} cannot be saved to {self.folder}: {failure}") from None
        return final

    def _make_empty(self, partial: Path, size: int) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise OSError(f"there is no room: about {_gigabytes(size)} are needed and {_gigabytes(free)} are free")
        partial.mkdir()  # not its parents: a folder that has vanished would come back as an empty one

    def _fingerprints(self, partial: Path) -> dict[str, list]:
        """Each rank reads every n-th file back from where all of them must be seen."""
        ours: dict[str, list] = {}

        def read() -> None:
            ours.update(fingerprints(partial, list_files(partial)[dist.get_rank() :: dist.get_world_size()]))

        self._run_on_all_ranks(read)
        everywhere: list[dict[str, list]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, ours, group=self.group)
        return {name: found for part in everywhere for name, found in part.items()}

    def _commit(
        self, partial: Path, final: Path, metadata: dict[str, Any], files: dict[str, list], record: Callable[[], None]
    ) -> None:
        _sync(partial)
        write_manifest(partial, metadata, files)
        _sync_folder(partial)
        record()
        partial.rename(final)
        _sync_folder(self.folder)
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        if self.keep is None:
            return
        there = list_checkpoints(self.folder)
        kept = {*there[-self.keep :], newest, self.resumed, _best(there)}
        for path in there:
            if path not in kept:
                with suppress(OSError):  # the next one that is saved tries again
                    _remove(path)

    def _run_on_rank0(self, act: Callable[[], None]) -> None:
        self._run_on_all_ranks(act if dist.get_rank() == 0 else lambda: None)

    def _run_on_all_ranks(self, act: Callable[[], None]) -> None:
        """Run `act` on all ranks; what fails on one raises _Failed on all."""
        problem = None
        try:
            act()
        except (OSError, SafetensorError) as error:
            problem = str(error) or type(error).__name__
        except CheckpointException as error:
            problem = first_failure(error)
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self.group)
        for found in problems:
            if found:
                raise _SaveFailed(found)


class _SaveFailed(Exception):
    """What went wrong on some rank, in its own words."""


def first_failure(error: CheckpointException) -> str:
    """torch's checkpointing wraps what happened on each rank; the first of these says it."""
    cause = str(next(iter(error.failures.values()))[0]).strip()
    return cause.splitlines()[-1] if cause else str(error)


def _best(checkpoints: list[Path]) -> Path | None:
    """The one with the lowest validation loss, of those that were validated."""
    losses = {}
    for path in checkpoints:
        try:
            losses[path] = read_manifest(path)["validation_loss"]
        except (ValueError, KeyError):
            continue
    known = {path: loss for path, loss in losses.items() if loss is not None}
    return min(known, key=lambda path: known[path], default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _quarantine(checkpoint: Path) -> Path:
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _remove(checkpoint: Path) -> None:
    """In two steps, so that no half of a checkpoint ever bears its name."""
    retired = checkpoint.with_name(f".{checkpoint.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    checkpoint.rename(retired)
    shutil.rmtree(retired, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Of saves and retirements that were killed."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _sync(folder: Path) -> None:
    """All that is in `folder`, onto the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
        elif path.is_dir():
            _sync_folder(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
