"""The memory of this machine, or of the container or job that this process runs in, where that may use less."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Files:
    """The files of a version of control groups: limit, use, and the row of memory.stat that can be dropped."""

    limit: str
    used: str
    droppable: str


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Files("memory.max", "memory.current", "inactive_file")


def total_memory() -> int:
    """Return the bytes of the machine, or the smallest limit of the control groups that this process is in."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def available_memory() -> int:
    """Return the bytes that can still be used, of the machine and of each control group that has a limit."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _limits())]))


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group with a limit; file contents that can be dropped are not used."""
    for folder, files in _groups():
        limit = _number(folder / files.limit)
        if limit is not None:
            yield limit, (_number(folder / files.used) or 0) - _droppable(folder, files)


def _groups() -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's control groups and of those around them.

    A container often sees its own group as the root, whatever its path outside.
    """
    try:
        lines = PROC.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # 4:memory:/docker/abc, or 0::/user.slice/job
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (CGROUPS / "memory", V1) if controllers else (CGROUPS, V2)
        own = root / path.lstrip("/")
        yield from ((folder, files) for folder in (own, *own.parents) if folder.is_relative_to(root))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # max: no limit


def _droppable(folder: Path, files: _Files) -> int:
    try:
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return next((int(value) for name, value in rows if name == files.droppable), 0)
    except (OSError, ValueError):
        return 0
