"""Checks of the run folder and of the checkpoint that the run resumes from: those of a start, without its changes."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sft_recipe.checkpoint.resume import (
    check_identity,
    check_resume_path,
    check_run_folder_is_free,
    find_checkpoint,
    restore_best_link,
)
from sft_recipe.checkpoint.run_lock import LOCK, FolderLock
from sft_recipe.config import preflight
from sft_recipe.config.run_config import changed_settings
from sft_recipe.config.schema import Config
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.errors import CheckpointError
from sft_recipe.readiness.findings import Check, Status, failed, passed, warned


def run_folder_checks(config: Config) -> tuple[list[Check], Path | None]:
    """Return the checks of the run folder, and the checkpoint that the run resumes from."""
    folder, spec, checks = config.trainer.run_folder, config.trainer.resume_from, list[Check]()
    checkpoints, notices, damaged, resume = folder / "checkpoints", list[str](), list[Path](), None
    try:
        check_resume_path(spec)
        if os.path.lexists(folder / LOCK):
            FolderLock(folder).release()
        restore_best_link(checkpoints, changes=False)
        resume = find_checkpoint(spec, checkpoints, is_restart=False, say=notices.append, damaged=damaged)
        check_run_folder_is_free(checkpoints, resume, damaged)
        if resume:
            checks.append(passed("run folder", "the run continues {checkpoint}", checkpoint=resume))
    except CheckpointError as error:
        checks.append(failed("run folder", "{error}", "", error=error))
    status: Status = "warning" if damaged else "ok"
    return [
        *(Check("run folder", status, "{notice}", values={"notice": notice}) for notice in notices),
        *checks,
    ], resume


def resume_checks(config: Config, inputs: RunInputs, resume: Path) -> Iterator[Check]:
    """Yield what keeps a run with this configuration and these inputs from continuing the checkpoint, and changes."""
    try:
        check_identity(resume, inputs.identity(config))
    except CheckpointError as error:
        yield failed("run folder", "{error}", "", error=error)
        return
    if changed := changed_settings(resume, config):
        text = "settings that differ from those of the run so far: {changed}"
        yield warned("run folder", text, "", changed=", ".join(changed))


def check_writable(folder: Path) -> None:
    """Raise CheckpointError if the run folder cannot be written; folders that this creates are removed again."""
    places = (folder / "checkpoints", folder, *folder.absolute().parents)
    created = [path for path in places if not os.path.lexists(path)]
    try:
        preflight.writable_folder(folder)
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.isdir(path))
