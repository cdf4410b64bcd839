"""Signals to a running training: stop after this step, or save and continue."""

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from sft_recipe.distributed.rendezvous import start_ticks

EXIT_PREEMPTED = 75  # exit code of a run that was requested to stop, and saved (EX_TEMPFAIL: try again)
REPEAT_S = 5.0  # seconds within which a stop sent to all processes of a job may reach a rank several times


class SignalHandler:
    """SIGTERM, SIGINT and the end of `max_time` (seconds since the launch) request a stop; SIGUSR1 requests a save.

    A SIGTERM or SIGINT more than REPEAT_S after the first ends the process at once with exit code 128 plus its number,
    unless `is_over` is set. Earlier ones are the same request: a stop that is sent to all processes of a job arrives
    here directly, and again from the launcher.
    """

    def __init__(self, max_time: float | None):
        self.max_time = max_time
        self.is_over = False
        self.wants_save = False
        self._stop_requested_at: float | None = None

    def listen(self) -> None:
        """Install the handlers; in the main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember_stop)
        signal.signal(signal.SIGUSR1, self._remember_save)

    @property
    def wants_stop(self) -> bool:
        """Return whether this process was requested to stop; other ranks may not have been."""
        is_requested = self._stop_requested_at is not None
        return is_requested or (self.max_time is not None and seconds_since_launch() > self.max_time)

    def _remember_stop(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self._stop_requested_at is None:
            self._stop_requested_at = now
        elif now - self._stop_requested_at > REPEAT_S and not self.is_over:
            # When it is over, torchrun sends one to the ranks of a stopped run.
            end_at_once(number, "without saving: it was the second signal")

    def _remember_save(self, _number: int, _frame: Any) -> None:
        self.wants_save = True


def end_at_once(number: int, how: str) -> NoReturn:
    """End this process with exit code 128 plus the number of the signal; local rank 0 prints its name and `how`."""
    with suppress(Exception):  # the signal may have come in the middle of a write
        sys.stdout.flush()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # progress bars hide it
        os.write(2, f"{cursor}stopped by {signal.Signals(number).name} {how}\n".encode())
    os._exit(128 + number)


def seconds_since_launch() -> float:
    """Return the seconds since torchrun was started, or this process without one; wall clock changes do not matter."""
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks(launcher) / os.sysconf("SC_CLK_TCK")
