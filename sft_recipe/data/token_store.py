"""The token store: every example's ids and mask, tokenised once per machine, memory-mapped, found by what made it."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import transformers

from sft_recipe.data.formats import Columns
from sft_recipe.data.readers import suffix_of
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.tokenize import Part, Report, StoreOptions, encode_files
from sft_recipe.errors import DataError

OTHERS, LOOK_ON = 20, 10_000  # bad records shown besides the first, from among so many records after it
ARRAYS = ("offsets", "supervised", "digests")
REJECTED = "rejected.jsonl"
DAMAGE = (OSError, ValueError, TypeError, EOFError)  # what reading a store that is not whole raises


@dataclass(frozen=True)
class TokenStore:
    """Examples on disk. `lengths` and `supervised` are tokens per example, int64 of shape (examples,).

    `digests`, uint64 of the same shape, are equal where examples are. `rejected.jsonl` in the folder has what was bad.
    """

    folder: Path
    report: Report
    offsets: np.ndarray = field(repr=False)
    supervised: np.ndarray
    digests: np.ndarray
    _ids: np.ndarray = field(repr=False)
    _mask: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Map a complete store into memory. Raises one of DAMAGE where it is not one."""
        report = Report(**json.loads((folder / "store.json").read_text()))
        offsets, supervised, digests = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        ids = np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r")
        mask = np.memmap(folder / "loss_mask.bin", dtype=np.uint8, mode="r")
        is_whole = len(offsets) - 1 == len(supervised) == len(digests) == report.examples
        if not is_whole or not len(ids) == len(mask) == offsets[-1] == report.tokens:
            raise ValueError(f"{folder} is not whole")
        return cls(folder, report, offsets, supervised, digests, ids, mask)

    def __len__(self) -> int:
        return len(self.supervised)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` (int32) and `loss_mask` (uint8) of one example, both of its length."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self._ids[span], self._mask[span]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Of the tokens and masks themselves: equal fingerprints, equal examples in equal order."""
        return self.report.digest


@dataclass(frozen=True)
class Examples:
    """A part of a store, such as its training share; `numbers` are the store's example numbers, int64.

    A number may stand there several times: an example that is trained several times an epoch.
    """

    store: TokenStore
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.store[self.numbers[index]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self.store.lengths[self.numbers]

    @property
    def fingerprint(self) -> str:
        """Equal where the same examples come in the same order."""
        numbers = hashlib.blake2b(self.numbers.tobytes(), digest_size=8).hexdigest()
        return f"{self.store.fingerprint}-{numbers}"

    @cached_property
    def supervised(self) -> int:
        """Supervised tokens in all of them."""
        return int(self.store.supervised[self.numbers].sum())


def open_store(
    files: Sequence[Path],
    tokenizer: Any,
    options: StoreOptions,
    cache_dir: Path,
    workers: int | None = None,
    show_progress: bool = False,
) -> TokenStore:
    """The store of these files, built where there is none yet.

    Raises DataError: a bad record (unless `on_bad_record` is skip); every example longer than `max_length`; no
    supervised token; a full disk. Raises ModelError: a tokenizer that no mask can be made with.
    """
    renderer = Renderer(tokenizer, options=options.render)  # raises for a slow tokenizer, which has no key either
    folder = cache_dir / "tokens" / store_key(files, tokenizer, options)
    try:
        return TokenStore.open(folder)
    except DAMAGE:
        pass
    try:
        with _partial_folder(folder) as partial_folder:
            _build(partial_folder, files, renderer, options, workers or os.cpu_count() or 1, show_progress)
            _replace(partial_folder, folder)
        return TokenStore.open(folder)
    except OSError as error:
        raise DataError(f"the token store cannot be written to {folder.parent}: {error.strerror or error}") from None


def store_key(files: Sequence[Path], tokenizer: Any, options: StoreOptions) -> str:
    """A digest of all that decides a store's contents: files, tokenizer, template, options and this code."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        digest.update(f"end of file, {suffix_of(path)}".encode())
    # Tokenising has switched off whatever truncation and padding tokenizer.json asks for: neither decides anything.
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, asdict(options), transformers.__version__]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for module in sorted([*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("rendering/*.py")]):
        digest.update(module.read_bytes())
    return digest.hexdigest()


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """A new folder to build in; what killed builds left beside it is removed.

    Whoever builds holds a lock on a file in there, which ends with the process. The folder comes by its name with
    the lock held, so that no other run takes it for one that was left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.glob("*.partial-*"):
        with suppress(OSError), (other / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other)
    name = f"{folder.name}.partial-{uuid4().hex[:12]}"
    new, partial_folder = folder.with_name(f".{name}"), folder.with_name(name)
    try:
        new.mkdir()
        with (new / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.rename(partial_folder)
            yield partial_folder
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(partial_folder, ignore_errors=True)


def _build(
    folder: Path, files: Sequence[Path], renderer: Renderer, options: StoreOptions, workers: int, show_progress: bool
) -> None:
    columns = Columns(options.columns)
    rejects = _Rejects(options.on_bad_record == "skip", folder / REJECTED)
    report = Report(examples_of_files=[0] * len(files))
    lengths: list[np.ndarray] = [np.zeros(1, np.int64)]
    supervised: list[np.ndarray] = []
    digests: list[np.ndarray] = []
    digest = hashlib.blake2b(digest_size=8)
    with (folder / "input_ids.bin").open("wb") as ids, (folder / "loss_mask.bin").open("wb") as mask:
        for number, part in encode_files(files, renderer, options, columns, workers, show_progress):
            rejects.take(part)
            ids.write(part.ids)
            mask.write(part.mask)
            digest.update(part.ids + part.mask)
            lengths.append(part.lengths)
            supervised.append(part.supervised)
            digests.append(part.digests)
            report.add(part.report)
            report.examples_of_files[number] += part.report.examples
        rejects.stop()
        _sync(ids)
        _sync(mask)
    columns.check_all_found()
    report.digest = digest.hexdigest()
    _check(report, files, options)
    arrays = np.cumsum(np.concatenate(lengths), dtype=np.int64), np.concatenate(supervised), np.concatenate(digests)
    for name, values in zip(ARRAYS, arrays, strict=True):
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, values)
            _sync(file)
    with (folder / "store.json").open("w") as text:
        json.dump(asdict(report), text)
        _sync(text)


def _check(report: Report, files: Sequence[Path], options: StoreOptions) -> None:
    if report.examples:
        return
    names = ", ".join(path.name for path in files)
    usable = report.records - sum(report.rejected.values())
    if not usable:
        raise DataError(f"{names}: none of the {report.records} records can be used ({report.kinds})")
    if report.too_long == usable:
        cure = f"set MAX_LENGTH to {report.longest}" + (
            ", or data.truncation=right to cut their end" if options.truncation == "drop" else ""
        )
        raise DataError(
            f"{names}: all {usable} examples are longer than max_length={options.max_length} tokens "
            f"(the longest has {report.longest}) and nothing is left to train on; {cure}"
        )
    raise DataError(f"{names}: no token is supervised in any of the {usable} records; nothing would be learnt")


class _Rejects:
    """Bad records: written down where they are skipped, else the reason to stop, told together with some others."""

    def __init__(self, skip: bool, path: Path):
        self.skip, self.path = skip, path
        self.errors: list[DataError] = []
        self.looked_on = 0

    def take(self, part: Part) -> None:
        if self.skip and part.rejected:
            with self.path.open("ab") as file:
                file.writelines(rejected.as_line() for rejected in part.rejected)
        if self.skip:
            return
        self.errors += [rejected.error for rejected in part.rejected]
        self.looked_on += part.report.records if self.errors else 0
        if len(self.errors) > OTHERS or self.looked_on >= LOOK_ON:
            self.stop()

    def stop(self) -> None:
        """Raises DataError if there was a bad record."""
        if not self.errors:
            return
        lines = [str(self.errors[0])]
        if others := self.errors[1 : OTHERS + 1]:
            more = "more than " if len(self.errors) > OTHERS + 1 else ""
            lines += [f"Nor can {more}{len(others)} other records be used:", *(f"  - {error}" for error in others)]
        lines.append("data.on_bad_record=skip leaves such records out, counts them and writes them down.")
        raise DataError("\n".join(lines), self.errors[0].kind)


def _replace(partial_folder: Path, folder: Path) -> None:
    """Publish a finished store; another run may have been faster with the same one, or left a damaged one."""
    try:
        partial_folder.rename(folder)
    except OSError:
        try:
            TokenStore.open(folder)
        except DAMAGE:
            shutil.rmtree(folder, ignore_errors=True)
            partial_folder.rename(folder)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
