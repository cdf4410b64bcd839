"""Writes token stores: in a partial folder, which gets its final name once everything is on the disk."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import numpy as np

from sft_recipe.data.token_store import ARRAYS, DAMAGE, IDS, MASK, REPORT, StoreReport, TokenStore
from sft_recipe.data.tokenize import EncodedChunk
from sft_recipe.files import locked, retried, sync


class StoreWriter:
    """A StoreWriter writes the encoded chunks of `file_count` files to a folder; `finish` completes the store.

    Use it as a context manager, which closes its files. All methods raise OSError.
    """

    def __init__(self, folder: Path, file_count: int):
        self.folder = folder
        self.report = StoreReport(examples_of_files=[0] * file_count)
        self._lengths = [np.zeros(1, np.int64)]
        self._supervised: list[np.ndarray] = []
        self._digests: list[np.ndarray] = []
        self._digest = hashlib.blake2b(digest_size=8)

    def __enter__(self) -> "StoreWriter":
        with ExitStack() as stack:
            self._ids = stack.enter_context((self.folder / IDS).open("wb"))
            self._mask = stack.enter_context((self.folder / MASK).open("wb"))
            self._open_files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def add(self, file_number: int, chunk: EncodedChunk) -> None:
        """Append the examples of a chunk, which come from the file with this number."""
        self._ids.write(chunk.ids)
        self._mask.write(chunk.mask)
        self._digest.update(chunk.ids + chunk.mask)
        self._lengths.append(chunk.lengths)
        self._supervised.append(chunk.supervised)
        self._digests.append(chunk.digests)
        self.report.add(chunk.report)
        self.report.examples_of_files[file_number] += chunk.report.examples

    def finish(self) -> None:
        """Write everything to the disk, the report last."""
        self._open_files.close()
        sync(self.folder / IDS)
        sync(self.folder / MASK)
        offsets = np.cumsum(np.concatenate(self._lengths), dtype=np.int64)
        arrays = offsets, np.concatenate(self._supervised), np.concatenate(self._digests)
        for name, values in zip(ARRAYS, arrays, strict=True):
            np.save(self.folder / f"{name}.npy", values)
            sync(self.folder / f"{name}.npy")
        self.report.digest = self._digest.hexdigest()
        (self.folder / REPORT).write_text(json.dumps(asdict(self.report)))
        sync(self.folder / REPORT)


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder` to build a store in; it is removed at the end of the context.

    The builder holds a lock on a file in the partial folder, which ends with the process, so that the next build can
    remove what killed builds have left. The folder has a hidden name until the lock is held, so that no other process
    takes it for such a remainder. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.glob("[!.]*.partial-*"):  # `*` alone matches hidden names
        with suppress(OSError), locked(other / "lock", wait=False):
            shutil.rmtree(other)
    name = f"{folder.name}.partial-{uuid4().hex[:12]}"
    unlocked, partial = folder.with_name(f".{name}"), folder.with_name(name)
    try:
        unlocked.mkdir()
        with locked(unlocked / "lock"):
            unlocked.rename(partial)
            yield partial
    finally:
        shutil.rmtree(unlocked, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


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
