"""Files on disk, for all packages: atomic writes, digests, repeated reads, locks between processes."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

BLOCK = 1 << 22  # bytes read at a time
THREADS = 8  # more than one disk or network mount keeps busy
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)  # before each further try of a read that has failed
MISSING = (FileNotFoundError, NotADirectoryError)
LASTING = (*MISSING, IsADirectoryError, PermissionError)  # errors that a further try gives again

T = TypeVar("T")


class Digest(Protocol):
    """A digest that bytes are added to, as in hashlib and xxhash."""

    def update(self, data: bytes, /) -> Any: ...


def user_path(path: str | Path) -> Path:
    """Return the path with ~ as the home folder; an unknown ~name stays as it is, unlike in Path.expanduser."""
    return Path(os.path.expanduser(path))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives the path of a partial file beside `path` to write to, and renames it to `path` at the end of the context.

    The contents are on the disk before the file has its name. Where the context fails nothing is left, and what stood
    at `path` before stays. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")  # containers have equal process ids
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. Raises OSError."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def drop_pages(descriptor: int, begin: int, size: int) -> None:
    """Ask the system to write a part of a file (size 0: to its end) and forget its pages; macOS has no such call."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(paths: Iterable[Path]) -> None:
    """Flush files to the disk, several at a time. Raises OSError."""
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(sync, paths))


def drop_cached(path: Path) -> None:
    """Let the next read of a file, which must have been flushed, come from the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        drop_pages(descriptor, 0, 0)
    finally:
        os.close(descriptor)


def update_digest(digest: Digest, path: Path) -> int:
    """Add a file's contents to a digest; returns their number of bytes. Raises OSError."""
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size


def digest(*parts: bytes | Path, size: int = 8) -> str:
    """Return a BLAKE2b of `size` bytes, in hex, of bytes and the contents of files in this order. Raises OSError."""
    found = hashlib.blake2b(digest_size=size)
    for part in parts:
        if isinstance(part, Path):
            update_digest(found, part)
        else:
            found.update(part)
    return found.hexdigest()


def digest_number(data: bytes) -> int:
    """Return a BLAKE2b of 64 bits as a number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def retried(read: Callable[[], T]) -> T:
    """Return what `read` returns; repeat it where it fails as network file systems do for a while (ESTALE, EIO).

    Raises the OSError of the last try.
    """
    for delay in RETRY_DELAYS_S:
        try:
            return read()
        except LASTING:
            raise
        except OSError:
            time.sleep(delay)
    return read()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is created; the lock ends with the context or the process.

    Raises BlockingIOError where another process holds it and `wait` is False, and OSError.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
