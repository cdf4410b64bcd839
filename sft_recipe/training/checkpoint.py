"""Checkpoints: written under another name and renamed when whole; found, checked, resumed from, and retired."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from sft_recipe.errors import CheckpointError

TRAINER_STATE = "trainer_state.json"
MANIFEST = "manifest.json"  # every file and its size; written last


def find_checkpoint(spec: str, folder: Path) -> Path | None:
    """The checkpoint that `trainer.resume_from` means; None where `auto` finds none in `folder`.

    Raises CheckpointError: no such folder, not a checkpoint, an incomplete one.
    """
    if spec == "auto":
        complete = [path for path in list_checkpoints(folder) if not problems_of(path)]
        return complete[-1] if complete else None
    path = Path(spec).expanduser()
    if not path.is_dir():
        there = ", ".join(found.name for found in list_checkpoints(path.parent)) if path.parent.is_dir() else ""
        raise CheckpointError(f"there is no checkpoint {path}" + (f"; beside it stand {there}" if there else ""))
    inner = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inner and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is a folder of checkpoints, not one; name one of them, such as {inner[-1]}")
    if found := problems_of(path):
        raise CheckpointError(f"{path} is no complete checkpoint: {found}")
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """step_N folders, oldest step first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def problems_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files compared with its manifest; empty where nothing is."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no readable {MANIFEST}"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return ""


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Step, counts and identity that a checkpoint was saved with."""
    return json.loads((checkpoint / TRAINER_STATE).read_text())


def check_identity(checkpoint: Path, ours: dict[str, Any]) -> None:
    """A run continues with the same model, data and batch plan. Raises CheckpointError that names what differs."""
    theirs = read_trainer_state(checkpoint)["identity"]
    lines = [
        f"  - {key}: {theirs.get(key)} there, {ours.get(key)} here" for key in ours if theirs.get(key) != ours.get(key)
    ]
    if lines:
        message = [f"{checkpoint} belongs to another run; it cannot be continued with this one's settings:", *lines]
        raise CheckpointError(
            "\n".join([*message, "Use the settings of that run, or start anew in another --output_dir."])
        )


def check_room_for_run(folder: Path, resume: Path | None) -> None:
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
    """One run's checkpoints in `folder`, of which the newest `keep` stay; collective, called by every rank."""

    def __init__(self, folder: Path, keep: int | None):
        self.folder = folder
        self.keep = keep

    def save(self, step: int, trainer_state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Let `write`, which is collective, fill a folder of another name; one rename makes it step_N when it is whole.

        Raises CheckpointError where it cannot be written, such as on a full disk; what was saved before stays.
        """
        final, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"

        def commit() -> None:
            (partial / TRAINER_STATE).write_text(json.dumps(trainer_state, indent=2))
            _write_manifest(partial)
            partial.rename(final)
            _sync_folder(self.folder)
            self._retire(final)

        try:
            _together(lambda: _empty(partial), only_first=True)
            _together(lambda: write(partial))
            _together(commit, only_first=True)
        except _Failed as failure:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"step {step} cannot be saved to {self.folder}: {failure}. What was saved before is whole; "
                "go on from it with --resume_from auto when there is room."
            ) from None
        return final

    def _retire(self, newest: Path) -> None:
        if self.keep is not None:
            for path in list_checkpoints(self.folder)[: -self.keep]:
                if path != newest:
                    shutil.rmtree(path, ignore_errors=True)


class _Failed(Exception):
    """What went wrong on some rank, in its own words."""


def _together(act: Callable[[], None], only_first: bool = False) -> None:
    """Run `act` on all ranks, or on rank 0 while the others wait; what fails on one raises _Failed on all."""
    problem = None
    try:
        if not only_first or dist.get_rank() == 0:
            act()
    except (OSError, SafetensorError) as error:
        problem = str(error) or type(error).__name__
    except CheckpointException as error:
        problem = first_failure(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found:
            raise _Failed(found)


def first_failure(error: CheckpointException) -> str:
    """torch's checkpointing wraps what happened on each rank; the first of these says it."""
    cause = str(next(iter(error.failures.values()))[0]).strip()
    return cause.splitlines()[-1] if cause else str(error)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size
            _sync_file(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2))
    _sync_file(manifest)
    for path in [folder, *(inner for inner in folder.rglob("*") if inner.is_dir())]:
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
