"""Run one command in a separate process and measure its time and the memory of its process tree."""

import json
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
SAMPLE_SECONDS = 0.2  # a sample takes milliseconds of a core that the measured may need


class RunFailed(Exception):
    """A runner failed; the message is the last line of its output."""


@dataclass(frozen=True)
class Measured:
    """`seconds` from begin to ready, `start_seconds` before that (imports), `peak` bytes up to ready, the messages.

    `anonymous` is the peak without pages of files, those that processes share counted once.
    """

    seconds: float
    start_seconds: float
    peak: int
    anonymous: int
    facts: dict[str, Any]


def measure(python: str, runner: str, *arguments: object, environment: dict[str, str]) -> Measured:
    """Run `runner` (a file beside this one) and read its messages. Raises RunFailed."""
    command = [python, str(HERE / runner), *map(str, arguments)]
    started = time.monotonic()
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        ready = threading.Event()
        memory = _Peak(process.pid, ready)
        complaints = _Tail(process.stderr)
        at: dict[str, float] = {}
        facts: dict[str, Any] = {}
        for line in process.stdout or ():
            message = _message(line)
            if message:
                at[message.pop("event")] = message.pop("at")
                facts |= message
            if "ready" in at:
                ready.set()
        ready.set()
        code = process.wait()
        memory.join()
        complaints.join()
    if code or "ready" not in at:
        raise RunFailed(complaints.last or f"exit code {code}")
    return Measured(at["ready"] - at["begin"], at["begin"] - started, memory.bytes, memory.anonymous, facts)


def _message(line: str) -> dict[str, Any]:
    """What clock.tell wrote; nothing for lines that someone else printed."""
    if not line.startswith('{"event"'):
        return {}
    return json.loads(line)


class _Peak(threading.Thread):
    """The most that a process and its descendants hold together, sampled: resident sizes, and anonymous memory."""

    def __init__(self, pid: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.process, self.stop, self.bytes, self.anonymous = psutil.Process(pid), stop, 0, 0
        self.start()

    def run(self) -> None:
        while not self.stop.wait(SAMPLE_SECONDS):
            try:
                tree = [self.process, *self.process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.bytes = max(self.bytes, sum(map(_resident, tree)))
            self.anonymous = max(self.anonymous, sum(map(_anonymous, tree)))


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it ended meanwhile
        return 0


def _anonymous(process: psutil.Process) -> int:
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon:"))


class _Tail(threading.Thread):
    """Reads a stream to its end, so that nobody blocks on it, and keeps the last line that says something."""

    def __init__(self, stream: Any):
        super().__init__(daemon=True)
        self.stream, self.last = stream, ""
        self.start()

    def run(self) -> None:
        for line in self.stream:
            self.last = line.strip() or self.last
