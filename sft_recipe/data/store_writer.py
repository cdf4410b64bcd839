"""Writes token stores: in a partial folder, which gets its final name once everything is on the disk."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import numpy as np

from sft_recipe.data.token_store import ARRAYS, DAMAGE, IDS, MASK, REJECTED, REPORT, StoreReport, TokenStore
from sft_recipe.data.tokenize import EncodedChunk
from sft_recipe.files import locked, retried, sync, write_text

# Only while a store is being built; of each example: length, supervised, digest, group (int64).
EXAMPLES, PROGRESS = "examples.bin", "progress.json"
SAVE_INTERVAL_S = 20.0  # between notes of the progress
KEPT_S = 7 * 24 * 3600.0  # how long the remainder of an interrupted build is kept


class StoreWriter:
    """A StoreWriter writes the encoded chunks of `file_count` files to a folder; `finish` completes the store.

    Use it as a context manager, which closes its files. In a folder that an interrupted build has left it continues
    after the `chunks` that were saved. All methods raise OSError.
    """

    def __init__(self, folder: Path, file_count: int):
        self.folder = folder
        self.report = StoreReport(examples_of_files=[0] * file_count)
        self._chunk_tokens: list[int] = []
        self._digest = hashlib.blake2b(digest_size=8)
        self._saved_at = time.monotonic()

    def __enter__(self) -> "StoreWriter":
        self._restore()
        with ExitStack() as stack:
            self._ids, self._mask, self._examples = (
                stack.enter_context((self.folder / name).open("ab")) for name in (IDS, MASK, EXAMPLES)
            )
            self._open_files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    @property
    def chunks(self) -> int:
        """Return the number of chunks that have been written."""
        return len(self._chunk_tokens)

    def add(self, file_number: int, chunk: EncodedChunk) -> None:
        """Append the examples of a chunk, which come from the file with this number."""
        self._ids.write(chunk.ids)
        self._mask.write(chunk.mask)
        self._digest.update(chunk.ids + chunk.mask)
        keys = (values.view(np.int64) for values in (chunk.digests, chunk.groups))
        self._examples.write(np.stack([chunk.lengths, chunk.supervised, *keys], axis=1).tobytes())
        self._chunk_tokens.append(len(chunk.mask))
        self.report.add(chunk.report)
        self.report.examples_of_files[file_number] += chunk.report.examples

    def save_progress(self) -> None:
        """Note what has been written, from time to time, so that a build that is interrupted later continues here."""
        if time.monotonic() < self._saved_at + SAVE_INTERVAL_S:
            return
        for file in (self._ids, self._mask, self._examples):
            file.flush()
            os.fsync(file.fileno())
        rejected = self.folder / REJECTED
        size = rejected.stat().st_size if rejected.exists() else 0
        progress = {"chunk_tokens": self._chunk_tokens, "report": asdict(self.report), "rejected_bytes": size}
        write_text(self.folder / PROGRESS, json.dumps(progress))
        self._saved_at = time.monotonic()

    def _restore(self) -> None:
        """Read what an interrupted build has noted, and cut off what it has written after that."""
        sizes = [0, 0, 0, 0]
        with suppress(*DAMAGE):
            values = json.loads((self.folder / PROGRESS).read_text())
            report = StoreReport.from_dict(values["report"])
            sizes = [4 * report.tokens, report.tokens, 32 * report.examples, values["rejected_bytes"]]
            self.report, self._chunk_tokens = report, values["chunk_tokens"]
        for name, size in zip((IDS, MASK, EXAMPLES, REJECTED), sizes, strict=True):
            if (self.folder / name).exists():
                os.truncate(self.folder / name, size)
        if not self._chunk_tokens:
            return
        with (self.folder / IDS).open("rb") as ids, (self.folder / MASK).open("rb") as mask:
            for count in self._chunk_tokens:
                self._digest.update(ids.read(4 * count) + mask.read(count))

    def finish(self) -> None:
        """Write everything to the disk, the report last."""
        self._open_files.close()
        sync(self.folder / IDS)
        sync(self.folder / MASK)
        lengths, supervised, *keys = np.memmap(self.folder / EXAMPLES, dtype=np.int64, mode="r").reshape(-1, 4).T
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        arrays = offsets, np.ascontiguousarray(supervised), *(np.ascontiguousarray(key).view(np.uint64) for key in keys)
        for name, values in zip(ARRAYS, arrays, strict=True):
            np.save(self.folder / f"{name}.npy", values)
            sync(self.folder / f"{name}.npy")
        for name in (EXAMPLES, PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
        self.report.digest = self._digest.hexdigest()
        (self.folder / REPORT).write_text(json.dumps(asdict(self.report)))
        sync(self.folder / REPORT)


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` to build a store in; it is removed at the end of the context.

    The builder holds a lock on a file in the partial folder, which ends with the process. A build that is interrupted,
    or killed, leaves the folder if it has noted its progress: the next build of this store continues in it, and other
    builds remove it after KEPT_S. A new folder has a hidden name until the lock is held, so that no other process
    takes it for such a remainder. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        partial = _continued(folder, stack)
        name = partial.name if partial else f"{folder.name}.partial-{uuid4().hex[:12]}"
        unlocked, partial = folder.with_name(f".{name}"), folder.with_name(name)
        try:
            if not partial.exists():
                unlocked.mkdir()
                stack.enter_context(locked(unlocked / "lock"))
                unlocked.rename(partial)
            yield partial
        except BaseException as error:
            if isinstance(error, Exception) or not (partial / PROGRESS).exists():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(unlocked, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def _continued(folder: Path, stack: ExitStack) -> Path | None:
    """The partial folder of an interrupted build of this store, now locked; removes what other builds have left."""
    found = None
    for other in folder.parent.glob("[!.]*.partial-*"):  # `*` alone matches hidden names
        with suppress(OSError), ExitStack() as lock:
            lock.enter_context(locked(other / "lock", wait=False))
            progress = other / PROGRESS
            is_kept = progress.exists() and time.time() - progress.stat().st_mtime < KEPT_S
            if is_kept and not found and other.name.startswith(f"{folder.name}.partial-"):
                found = other
                stack.enter_context(lock.pop_all())
            elif not is_kept:
                shutil.rmtree(other)
    return found


def publish(partial: Path, folder: Path) -> None:
    """Give a finished store its name, unless another process has published the same store. Raises OSError."""
    try:
        partial.rename(folder)
    except OSError:
        try:
            retried(lambda: TokenStore.open(folder))
        except DAMAGE:
            damaged = folder.with_name(f".{partial.name}.damaged")
            with suppress(FileNotFoundError):  # another process was faster
                folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
            with suppress(OSError):  # the same
                partial.rename(folder)
