"""One run at a time in a run folder: a lock that dies with its process, and says whose it is."""

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipe.errors import CheckpointError

LOCK = ".lock"
HEARTBEAT_INTERVAL_S = 5.0  # seconds between signs of life


class FolderLock:
    """Held by one process of a run, from here until `release` or its death, however it dies.

    The file names host and process. The operating system's lock on it counts; where a shared file system does not carry
    such locks from machine to machine, the file's signs of life do: a counter that its holder raises every few seconds.
    Clocks are not compared.
    """

    def __init__(self, folder: Path):
        """Raises CheckpointError: another run is there, whose host and process it names; a lock that is not ours."""
        try:
            self.file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"the run folder {folder} cannot be locked: {LOCK}: {error.strerror}") from None
        holder = self._read()
        try:
            # A process's lock, not an open file's: children that outlive this process do not inherit it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = _is_elsewhere(holder) and self._is_refreshed(holder)
        except (BlockingIOError, PermissionError):
            is_held = True
        except OSError:  # this file system has no locks
            is_held = bool(holder) and self._is_refreshed(holder)
        if is_held:
            os.close(self.file)
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise CheckpointError(
                f"a run is writing to {folder} already: {who}. Wait for its end, or stop it, or write elsewhere with "
                "--output_dir FOLDER."
            )
        self._heartbeats = 0
        self._released = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._refresh, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Leave the folder to others."""
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
            except OSError:  # the folder is gone for now: saving tells of that
                continue

    def _write(self) -> None:
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beats": self._heartbeats})
        os.pwrite(self.file, text.ljust(256).encode(), 0)
        os.fsync(self.file)

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(os.pread(self.file, 4096, 0) or b"{}")
        except ValueError:
            return {}

    def _is_refreshed(self, holder: dict[str, Any]) -> bool:
        time.sleep(3 * HEARTBEAT_INTERVAL_S)
        return self._read() != holder


def _is_elsewhere(holder: dict[str, Any]) -> bool:
    return bool(holder) and holder["host"] != socket.gethostname()
