"""Where the ranks of one run on one machine meet before they can talk: a small folder that all of them find."""

import os
import shutil
import tempfile
from pathlib import Path


def rendezvous_dir() -> Path:
    """This attempt's folder: the ranks of one run on one machine have the same parent process, and only they."""
    attempt = _run_place() / os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    attempt.mkdir(mode=0o700, exist_ok=True)
    return attempt


def is_single_process() -> bool:
    """Whether this process is a whole run: others beside it, of one shell, have the same parent."""
    return os.environ.get("WORLD_SIZE", "1") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ


def is_error_reporter() -> bool:
    """True for the first process of this machine's ranks that asks: an error that all of them meet is told once."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return True
    try:
        (rendezvous_dir() / "spoken").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def remove_rendezvous_dir() -> None:
    """Remove what the ranks of this machine shared; for local rank 0, when all is done."""
    shutil.rmtree(_run_place(), ignore_errors=True)


def record_exit(code: int) -> None:
    """Remember an exit code that starting again would not change: torchrun restarts whatever fails."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        (_run_place() / "end").write_text(str(code))


def recorded_exit() -> int | None:
    """The exit code with which an attempt before this one ended for good."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    note = _run_place() / "end"
    return int(note.read_text()) if note.is_file() else None


def _run_place() -> Path:
    parent = os.getppid()
    # In clock ticks since the machine started: exact, whatever the wall clock does.
    name = f"sft_recipe-{os.getuid()}-{parent}-{start_ticks(parent)}"
    if is_single_process():
        name += f"-{os.getpid()}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def start_ticks(process: int) -> int:
    """When a process began, in clock ticks since the machine started."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
