"""The rendezvous folder: what the ranks of one run on one machine share before the process group exists."""

import os
import shutil
import tempfile
from pathlib import Path

EXIT_FILE = "exit_code"


def rendezvous_dir() -> Path:
    """Return the folder of this attempt; a rank finds it by its parent process, which all ranks here have in common."""
    attempt = _run_dir() / os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
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
        (rendezvous_dir() / "reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def remove_rendezvous_dir() -> None:
    """Remove the folders of all attempts; for local rank 0, at the end of the run."""
    shutil.rmtree(_run_dir(), ignore_errors=True)


def record_exit(code: int) -> None:
    """Store an exit code that a restart would not change: torchrun restarts every rank that fails."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        (_run_dir() / EXIT_FILE).write_text(str(code))


def recorded_exit() -> int | None:
    """Return the exit code that an earlier attempt stored, or None."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    exit_file = _run_dir() / EXIT_FILE
    return int(exit_file.read_text()) if exit_file.is_file() else None


def _run_dir() -> Path:
    parent = os.getppid()
    # The start in clock ticks distinguishes a process from an earlier one with the same number.
    name = f"sft_recipe-{os.getuid()}-{parent}-{start_ticks(parent)}"
    if is_single_process():
        name += f"-{os.getpid()}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def start_ticks(process: int) -> int:
    """Return when a process was started, in clock ticks since the machine was."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
