"""The rendezvous folder: what the ranks of one run on one machine share before the process group exists."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

from sft_recipe.errors import PreflightError

EXIT_FILE = "exit_code"
REPORTED = "reported"
OWN_FOLDER = "sft_recipe"  # in torchrun's folder of a run
FIRST_ATTEMPT = "SFT_RECIPE_FIRST_ATTEMPT"  # of a machine that joined a run whose ranks had been restarted before


def attempt() -> int:
    """Return how often the ranks of the run were restarted before those of this process were started."""
    return int(os.environ.get(FIRST_ATTEMPT, "0")) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rendezvous_dir() -> Path:
    """Return the folder of this attempt, which all ranks of the run on this machine find, and create it.

    Raises PreflightError for a folder that somebody else has created.
    """
    attempt = _create_run_dir() / os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    attempt.mkdir(mode=0o700, exist_ok=True)
    return attempt


def is_single_process() -> bool:
    """Return whether this process is the only rank, which no torchrun started: its parent may have other runs."""
    return os.environ.get("WORLD_SIZE", "1") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ


def is_error_reporter() -> bool:
    """Return True for the first rank of this machine that asks, so that an error on all of them is printed once."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return True
    try:
        (rendezvous_dir() / REPORTED).touch(exist_ok=False)
    except FileExistsError:
        return False
    except (OSError, PreflightError):  # the error that it cannot be created is reported by each
        return True
    return True


def is_error_reported() -> bool:
    """Return True if a rank of this machine has asked whether it prints an error; torchrun then ends the others."""
    return (_run_dir() / os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") / REPORTED).exists()


def remove_rendezvous_dir() -> None:
    """Remove the folders of all attempts; for local rank 0, at the end of the run."""
    shutil.rmtree(_run_dir(), ignore_errors=True)


def record_exit(code: int) -> None:
    """Store an exit code that a restart would not change: torchrun restarts every rank that fails."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        (_create_run_dir() / EXIT_FILE).write_text(str(code))


def record_stop(log_dir: Path, code: int) -> None:
    """Store the exit code of a stopped run for the ranks that torchrun would restart; for the launcher.

    `log_dir` is the folder that torchrun was given for its logs.
    """
    for run in log_dir.glob("*/"):
        (run / OWN_FOLDER).mkdir(mode=0o700, exist_ok=True)
        (run / OWN_FOLDER / EXIT_FILE).write_text(str(code))


def recorded_exit() -> int | None:
    """Return the exit code that an earlier attempt stored, or None."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    exit_file = _run_dir() / EXIT_FILE
    return int(exit_file.read_text()) if exit_file.is_file() else None


def _run_dir() -> Path:
    """Under torchrun a folder in the one that it has created for this run, under a random name."""
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # RUN/attempt_N/LOCAL_RANK/error.json
        return Path(error_file).parents[2] / OWN_FOLDER
    parent = os.getppid()  # all ranks here have it in common
    # The start in clock ticks distinguishes a process from an earlier one with the same number.
    name = f"sft_recipe-{os.getuid()}-{parent}-{start_ticks(parent)}"
    if is_single_process():
        name += f"-{os.getpid()}"
    return Path(tempfile.gettempdir()) / name


def _create_run_dir() -> Path:
    """Anybody may create a folder of that name where users share the folder of temporary files."""
    folder = _run_dir()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise PreflightError(f"{folder} cannot be created: {error.strerror}; set TMPDIR to a folder of yours") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PreflightError(f"{folder} is not yours alone; remove it, or set TMPDIR to a folder of yours")
    return folder


def start_ticks(process: int) -> int:
    """Return when a process was started, in clock ticks since the machine was."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
