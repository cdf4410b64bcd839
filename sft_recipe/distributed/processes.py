"""Processes: the cores that they may use, and their end with the process that started them."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def available_cores() -> int:
    """Return how many cores this process may use: fewer than the machine has in a job or a container."""
    return len(os.sched_getaffinity(0))


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGKILL when the process `parent`, which started this one, ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before the call above
        os._exit(128 + signal.SIGKILL)
