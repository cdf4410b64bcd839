"""The memory of a CPU rank: its anonymous pages, now and at their peak.

Pages of files that are mapped, such as those of a model's weights, do not count: the kernel drops them where memory is
short. It keeps a process's peak of both together only, so that a thread looks at the anonymous ones.
"""

import os
import threading
import time
from functools import cache

import psutil

INTERVAL_S = 0.02


def process_memory() -> int:
    """Return the bytes of this process that cannot be dropped: all resident ones where the system does not tell."""
    found = psutil.Process().memory_info()
    return found.rss - getattr(found, "shared", 0)


class PeakMemory:
    """The most memory of this process since it was made; memory that is held for less than 0.02 s may be missed."""

    def __init__(self) -> None:
        self._peak, self._lock = 0, threading.Lock()
        threading.Thread(target=self._watch, name="memory", daemon=True).start()

    def read(self) -> int:
        """Return the peak in bytes."""
        with self._lock:
            self._peak = max(self._peak, process_memory())
            return self._peak

    def _watch(self) -> None:
        while True:
            self.read()
            time.sleep(INTERVAL_S)


@cache
def peak_memory() -> PeakMemory:
    """Return the peak of this process since the first call."""
    return PeakMemory()


# A forked process has neither the thread nor, where the thread was reading at that moment, a lock that it could take.
os.register_at_fork(after_in_child=peak_memory.cache_clear)
