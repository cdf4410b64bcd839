"""The lock of a run folder: one run at a time writes into it, and the lock ends with its process."""

import fcntl
import json
import os
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipe.errors import CheckpointError

LOCK = ".lock"
HEARTBEAT_INTERVAL_S = 5.0  # between updates of the lock file
SIZE = 256  # bytes of the lock file


class FolderLock:
    """Locks a run folder from its construction until `release` or the end of the process.

    The file names host and process. The operating system locks it; where a shared file system does not carry such
    locks between machines, the file's heartbeats count: a number that its holder increases every few seconds. Clocks
    are not compared. Content that names no holder may be that of another machine too.
    """

    def __init__(self, folder: Path):
        """Lock `folder`. Raises CheckpointError: another run, whose host and process it names; a folder without write
        permission, or on a full disk.
        """
        try:
            self.file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unlockable(folder, error.strerror) from None
        if not stat.S_ISREG(os.fstat(self.file).st_mode):
            os.close(self.file)
            raise _unlockable(folder, "Not a regular file")
        holder = self._read()
        try:
            # A process's lock, not an open file's: children that outlive this process do not inherit it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = bool(holder) and _host(holder) != socket.gethostname() and self._is_refreshed(holder)
        except (BlockingIOError, PermissionError):
            is_held = True
        except OSError:  # this file system has no locks
            is_held = bool(holder) and self._is_refreshed(holder)
        if is_held:
            os.close(self.file)
            who = f"process {_owner(holder)['pid']} on {_host(holder)}" if _host(holder) else "another process"
            raise CheckpointError(
                f"another run is writing to {folder}: {who}. Wait until it ends, or stop it, or write elsewhere with "
                "--output_dir FOLDER."
            )
        self._heartbeats = 0
        self._released = threading.Event()
        try:
            self._write()
            os.ftruncate(self.file, SIZE)  # what else was in the file
        except OSError as error:
            os.close(self.file)
            raise _unlockable(folder, error.strerror) from None
        self._thread = threading.Thread(target=self._refresh, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Unlock the folder."""
        self._released.set()
        self._thread.join(HEARTBEAT_INTERVAL_S)
        with suppress(OSError):  # the folder may be gone
            os.ftruncate(self.file, 0)
        os.close(self.file)

    def _refresh(self) -> None:
        while not self._released.wait(HEARTBEAT_INTERVAL_S):
            self._heartbeats += 1
            try:
                self._write()
            except OSError:  # the folder has vanished: saving reports it
                continue

    def _write(self) -> None:
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beats": self._heartbeats})
        os.pwrite(self.file, text.ljust(SIZE).encode(), 0)
        os.fsync(self.file)

    def _read(self) -> bytes:
        return os.pread(self.file, 4096, 0).strip()

    def _is_refreshed(self, holder: bytes) -> bool:
        time.sleep(3 * HEARTBEAT_INTERVAL_S)
        return self._read() != holder


def _unlockable(folder: Path, reason: str | None) -> CheckpointError:
    return CheckpointError(f"the run folder {folder} cannot be locked: {LOCK}: {reason}")


def _owner(holder: bytes) -> dict[str, Any]:
    """Return what the holder wrote; empty for content of something else, whose owner is unknown."""
    try:
        owner = json.loads(holder)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) and {"host", "pid"} <= owner.keys() else {}


def _host(holder: bytes) -> str | None:
    return _owner(holder).get("host")
