"""Checkpoints: found, verified and resumed from; written under another name and renamed when complete; pruned."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

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
from sft_recipe.distributed.consistency import different_keys
from sft_recipe.errors import CheckpointError
from sft_recipe.files import sync, user_path

AUTO = "auto"
BEST = "best"

T = TypeVar("T")


def find_checkpoint(spec: str | None, folder: Path, is_restart: bool, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that `trainer.resume_from` means; None for a run that starts from the beginning.

    Every byte of it has been read and compared with its checksums. `auto` is the newest of `folder`; so is the first
    choice of a run that was restarted after a failure. Raises CheckpointError: no such folder, not a checkpoint, a
    damaged one, one of a newer version of this program, one that cannot be read now.
    """
    try:
        return _find(spec, folder, is_restart, say)
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where} cannot be read or renamed: {error.strerror or error}") from None


def _find(spec: str | None, folder: Path, is_restart: bool, say: Callable[[str], None]) -> Path | None:
    if (spec == AUTO or is_restart) and (newest := _newest_valid(folder, say)):
        return newest
    if spec == AUTO:
        say(f"--resume_from auto found no checkpoint in {folder}: training starts from the beginning.")
        return None
    return _named(user_path(spec)) if spec else None


def restore_best_link(folder: Path) -> None:
    """Make `best` a link again where a copy of the run folder has a folder instead; nothing is lost.

    The folder gets the name of its step, or is removed where the same checkpoint is there under that name. Raises
    CheckpointError where another one is.
    """
    best = folder / BEST
    if best.is_symlink() or not best.is_dir():
        return
    try:
        step = folder / f"step_{read_manifest(best)['step']}"
        if not step.exists():
            best.rename(step)
        elif read_manifest(step) == read_manifest(best) and not verify(step):
            shutil.rmtree(best)
        else:
            raise ValueError(f"it differs from {step.name}")
        best.symlink_to(step.name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{best} should be a link to a checkpoint, but is a folder: {error}. Give it another name."
        ) from None


def check_free_space(folder: Path, size: int) -> None:
    """Raise OSError where the disk of `folder` has less than `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"the disk is too full: about {_gigabytes(size)} are needed and {_gigabytes(free)} are free")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the step_N folders, oldest step first."""
    matches = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.glob("step_*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Check that the checkpoint's run has this run's model, data and batches. Raises CheckpointError: what differs."""
    saved = read_manifest(checkpoint)["identity"]
    differences = [
        f"  - {key}: {saved[key]} in the checkpoint, {identity[key]} now" for key in different_keys(saved, identity)
    ]
    if differences:
        raise CheckpointError(
            "\n".join(
                [
                    f"{checkpoint} belongs to another run; it cannot be continued with these settings:",
                    *differences,
                    "Use the settings of that run, or start a new one with --output_dir FOLDER.",
                ]
            )
        )


def check_run_folder_is_free(folder: Path, resume: Path | None) -> None:
    """Check that saving into `folder` overwrites no checkpoint. Raises CheckpointError that says what to do."""
    existing = list_checkpoints(folder)
    if resume is None and existing:
        raise CheckpointError(
            f"{folder} holds {existing[-1].name} of an earlier run. Continue it with --resume_from auto, "
            "or write this run elsewhere with --output_dir FOLDER, or remove it."
        )
    if resume is None or resume.parent.resolve() != folder.resolve():
        if existing:
            raise CheckpointError(
                f"{folder} holds {existing[-1].name} of another run; write this one elsewhere with --output_dir"
            )
        return
    step = read_manifest(resume)["step"]  # its folder may have any name
    newer = [path.name for path in existing if _step(path) > step]
    if newer:
        raise CheckpointError(
            f"{folder} holds {', '.join(newer)}, newer than {resume.name}. Continue the newest with --resume_from "
            "auto, or write elsewhere with --output_dir FOLDER, or remove the newer ones."
        )


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
        write: Callable[[Path], set[str]],
        record: Callable[[], None],
    ) -> Path:
        """Save a checkpoint of about `size` bytes as step_N. Returns its folder.

        `write` is collective and fills the folder that it is given; the folder gets its name when it is complete. It
        returns the relative names of files that this rank has written, which must be there in the end.
        `metadata` goes into the manifest. `record` writes the run's metrics to the disk first.
        Raises CheckpointError on all ranks where the checkpoint cannot be written, such as on a full disk; earlier
        checkpoints stay.
        """
        final, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"
        try:
            self._run_on_rank0(lambda: self._make_empty(partial, size))
            written: set[str] = set()
            self._run_on_all_ranks(lambda: written.update(_write_into(partial, write)))
            files = self._fingerprints(partial, written)
            self._run_on_rank0(lambda: self._commit(partial, final, metadata, files, record))
        except _SaveFailed as failure:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
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
        _sync_tree(partial)
        for path in partial.iterdir():
            shutil.rmtree(checkpoint / path.name, ignore_errors=True)
            path.rename(checkpoint / path.name)
        metadata = {key: value for key, value in read_manifest(checkpoint).items() if key != "files"}
        write_manifest(checkpoint, metadata, fingerprints(checkpoint, list_files(checkpoint)))

    def _make_empty(self, partial: Path, size: int) -> None:
        _remove_leftovers(self.folder)
        check_free_space(self.folder, size)
        partial.mkdir()  # not its parents: a folder that has vanished must not come back as an empty one

    def _fingerprints(self, partial: Path, written: set[str]) -> dict[str, list]:
        """Each rank reads every n-th file back from the file system that all ranks share.

        The files are those that rank 0 lists and those that any rank has written: on a network file system a listing
        may be older than the newest files. A file that was written and is not there fails the save.
        """
        self._run_on_rank0(lambda: written.update(list_files(partial)))
        names = sorted(set().union(*self._gather(written)))[dist.get_rank() :: dist.get_world_size()]
        part: dict[str, list] = {}
        self._run_on_all_ranks(lambda: part.update(fingerprints(partial, names)))
        return {name: value for part in self._gather(part) for name, value in part.items()}

    def _gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _commit(
        self, partial: Path, final: Path, metadata: dict[str, Any], files: dict[str, list], record: Callable[[], None]
    ) -> None:
        _sync_tree(partial)
        write_manifest(partial, metadata, files)
        sync(partial)
        record()
        partial.rename(final)
        sync(self.folder)
        self._link_best()
        self._prune(final)

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


def _newest_valid(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Newer ones that are damaged get another name, since a folder called step_N is complete."""
    for path in reversed(list_checkpoints(folder)):
        if not (problem := verify(path)):
            return path
        say(f"{path} is damaged: {problem}. It is renamed to {_quarantine(path).name}.")
    return None


def _named(path: Path) -> Path:
    """A link, such as `latest`, is what it points to."""
    path = path.resolve() if path.is_symlink() else path
    if not path.is_dir():
        siblings = ", ".join(sibling.name for sibling in list_checkpoints(path.parent)) if path.parent.is_dir() else ""
        raise CheckpointError(f"there is no checkpoint {path}" + (f"; its folder holds {siblings}" if siblings else ""))
    inner = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inner and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is a folder of checkpoints, not a checkpoint; name one, such as {inner[-1]}")
    if problem := verify(path):
        raise CheckpointError(
            f"{path} is no complete checkpoint: {problem}. --resume_from auto takes the newest complete one."
        )
    return path


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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _quarantine(checkpoint: Path) -> Path:
    quarantined = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(quarantined, ignore_errors=True)
    return checkpoint.rename(quarantined)


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


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            sync(path)
