"""Finds the checkpoint that a run resumes from, verifies it, and checks that the run may continue it."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft_recipe.checkpoint.manager import list_checkpoints, quarantine
from sft_recipe.checkpoint.manifest import BEST, MANIFEST, read_manifest, verify
from sft_recipe.distributed.consistency import different_keys
from sft_recipe.errors import CheckpointError
from sft_recipe.files import user_path

AUTO = "auto"


def find_checkpoint(
    spec: str | None, folder: Path, is_restart: bool, say: Callable[[str], None], damaged: list[Path] | None = None
) -> Path | None:
    """Return the checkpoint that `trainer.resume_from` means; None for a run that starts from the beginning.

    Every byte of it has been read and compared with its checksums. `auto` is the newest of `folder`; so is the first
    choice of a run that was restarted after a failure. Newer ones that are damaged get another name, since a folder
    called step_N is complete; where `damaged` is given, they are added to it instead. Raises CheckpointError: no such
    folder, not a checkpoint, a damaged one, one of a newer version of this program, one that cannot be read now.
    """
    try:
        return _find(spec, folder, is_restart, say, damaged)
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where} cannot be read or renamed: {error.strerror or error}") from None


def check_resume_path(spec: str | None) -> None:
    """Raise CheckpointError where `trainer.resume_from` names a folder that is no checkpoint; reads no weights."""
    if spec not in (None, AUTO):
        _located(user_path(spec))


def _find(
    spec: str | None, folder: Path, is_restart: bool, say: Callable[[str], None], damaged: list[Path] | None
) -> Path | None:
    if (spec == AUTO or is_restart) and (newest := _newest_valid(folder, say, damaged)):
        return newest
    if spec == AUTO:
        say(f"--resume_from auto found no checkpoint in {folder}: training starts from the beginning.")
        return None
    return _named(user_path(spec)) if spec else None


def resumed_identity(spec: str | None, folder: Path, is_restart: bool) -> dict[str, Any]:
    """Return the identity of the run that `trainer.resume_from` means (see `find_checkpoint`); empty if there is none.

    It reads no weights, and says nothing of damage: all checkpoints of a run have the same identity.
    """
    found = list_checkpoints(folder)[-1:] if spec == AUTO or is_restart else []
    if not found and spec not in (None, AUTO):
        found = [user_path(spec)]
    try:
        return dict(read_manifest(found[0])["identity"]) if found else {}
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return {}


def restore_best_link(folder: Path, changes: bool = True) -> None:
    """Make `best` a link again where a copy of the run folder has a folder instead; nothing is lost.

    The folder gets the name of its step, or is removed where the same checkpoint is there under that name. Raises
    CheckpointError where another one is; without `changes` this is all that it does.
    """
    best = folder / BEST
    if best.is_symlink() or not best.is_dir():
        return
    try:
        step = folder / f"step_{read_manifest(best)['step']}"
        if step.exists() and (read_manifest(step) != read_manifest(best) or verify(step)):
            raise ValueError(f"it differs from {step.name}")
        if changes:
            if step.exists():
                shutil.rmtree(best)
            else:
                best.rename(step)
            best.symlink_to(step.name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{best} should be a link to a checkpoint, but is a folder: {error}. Give it another name."
        ) from None


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


def check_run_folder_is_free(folder: Path, resume: Path | None, damaged: Sequence[Path] = ()) -> None:
    """Check that saving into `folder` overwrites no checkpoint but the `damaged` ones. Raises CheckpointError that
    says what to do.
    """
    existing = [path for path in list_checkpoints(folder) if path not in damaged]
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
    if resume.name in newer:
        other = folder / f"step_{step}"
        remedy = "Remove it" if other.exists() else f"Rename it to {other.name}, or remove it"
        raise CheckpointError(
            f"{resume} does not have the name of its step: its manifest says step {step}. {remedy}, and start again."
        )
    if newer:
        raise CheckpointError(
            f"{folder} holds {', '.join(newer)}, newer than {resume.name}. Continue the newest with --resume_from "
            "auto, or write elsewhere with --output_dir FOLDER, or remove the newer ones."
        )


def _newest_valid(folder: Path, say: Callable[[str], None], damaged: list[Path] | None) -> Path | None:
    for path in reversed(list_checkpoints(folder)):
        if not (problem := verify(path)):
            return path
        if damaged is None:
            what = f"It is renamed to {quarantine(path).name}"
        else:
            damaged.append(path)
            what = "A start renames it"
        say(f"{path} is damaged: {problem}. {what}.")
    return None


def _named(path: Path) -> Path:
    path = _located(path)
    if problem := verify(path):
        raise _incomplete(path, problem)
    return path


def _located(path: Path) -> Path:
    """A link, such as `latest`, is what it points to."""
    path = Path(os.path.realpath(path)) if os.path.islink(path) else path
    if not os.path.isdir(path):  # also for links in a circle, and for names that are too long
        siblings = ", ".join(sibling.name for sibling in list_checkpoints(path.parent)) if path.parent.is_dir() else ""
        raise CheckpointError(f"there is no checkpoint {path}" + (f"; its folder holds {siblings}" if siblings else ""))
    inner = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inner and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is a folder of checkpoints, not a checkpoint; name one, such as {inner[-1]}")
    if not (path / MANIFEST).is_file():
        raise _incomplete(path, f"no readable {MANIFEST}")
    return path


def _incomplete(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no complete checkpoint: {problem}. --resume_from auto takes the newest complete one."
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
