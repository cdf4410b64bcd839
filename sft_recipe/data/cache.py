"""The token store: every example's ids and mask, tokenised once per machine, memory-mapped, found by what made it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np

from sft_recipe.data import formats, messages, render
from sft_recipe.data.formats import read_conversations
from sft_recipe.data.messages import Conversation
from sft_recipe.data.render import Encoded, Renderer
from sft_recipe.errors import DataError

CHUNK = 512  # conversations that a worker renders and tokenises at a time
IN_PROCESS = 8 * CHUNK  # fewer conversations are not worth starting processes for
DAMAGE = (OSError, ValueError, TypeError, EOFError)  # what reading a store that is not whole raises


@dataclass(frozen=True)
class StoreOptions:
    """What decides a store's contents besides files and tokenizer; part of its key."""

    format: str = "auto"
    max_length: int = 2048
    truncation: str = "drop"


@dataclass
class Report:
    """What became of the records: counts of examples, lengths in tokens."""

    records: int = 0
    examples: int = 0
    too_long: int = 0
    longest: int = 0
    without_target: int = 0
    tokens: int = 0
    supervised: int = 0
    digest: str = ""


@dataclass(frozen=True)
class TokenStore:
    """Examples on disk. `lengths` and `supervised` are tokens per example, int64 of shape (examples,)."""

    folder: Path
    report: Report
    offsets: np.ndarray
    supervised: np.ndarray
    _ids: np.ndarray = field(repr=False)
    _mask: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Map a complete store into memory. Raises one of DAMAGE where it is not one."""
        report = Report(**json.loads((folder / "store.json").read_text()))
        offsets = np.load(folder / "offsets.npy")
        ids = np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r")
        mask = np.memmap(folder / "loss_mask.bin", dtype=np.uint8, mode="r")
        supervised = np.load(folder / "supervised.npy")
        is_whole = len(offsets) == len(supervised) + 1 == report.examples + 1
        if not is_whole or not len(ids) == len(mask) == offsets[-1] == report.tokens:
            raise ValueError(f"{folder} is not whole")
        return cls(folder, report, offsets, supervised, ids, mask)

    def __len__(self) -> int:
        return len(self.offsets) - 1

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
    """A part of a store, such as its training share; `numbers` are the store's example numbers, int64."""

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

    @cached_property
    def supervised(self) -> int:
        """Supervised tokens in all of them."""
        return int(self.store.supervised[self.numbers].sum())


def open_store(
    files: list[Path],
    tokenizer: Any,
    options: StoreOptions,
    cache_dir: Path,
    workers: int | None = None,
    show_progress: bool = False,
) -> TokenStore:
    """The store of these files, built where there is none yet.

    Raises DataError: a bad record; every example longer than `max_length`; no supervised token; a full disk.
    Raises ModelError: a tokenizer that no mask can be made with.
    """
    Renderer(tokenizer)  # raises for a slow tokenizer, which has no key either
    folder = cache_dir / "tokens" / store_key(files, tokenizer, options)
    try:
        return TokenStore.open(folder)
    except DAMAGE:
        pass
    partial_folder = folder.with_name(f"{folder.name}.partial-{uuid4().hex[:12]}")
    try:
        partial_folder.mkdir(parents=True)
        _build(partial_folder, files, tokenizer, options, workers or os.cpu_count() or 1, show_progress)
        _replace(partial_folder, folder)
        return TokenStore.open(folder)
    except OSError as error:
        raise DataError(f"the token store cannot be written to {folder.parent}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def store_key(files: list[Path], tokenizer: Any, options: StoreOptions) -> str:
    """A digest of all that decides a store's contents: files, tokenizer, template, options and this code."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        digest.update(b"end of file")
    # Tokenising switches off whatever truncation and padding tokenizer.json asks for, so neither decides anything.
    core = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    parts = [core, tokenizer.chat_template, tokenizer.special_tokens_map, asdict(options)]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for module in (formats, messages, render):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def _build(
    folder: Path, files: list[Path], tokenizer: Any, options: StoreOptions, workers: int, show_progress: bool
) -> None:
    report, lengths, supervised = Report(), [0], []
    digest = hashlib.blake2b(digest_size=8)
    with (folder / "input_ids.bin").open("wb") as ids, (folder / "loss_mask.bin").open("wb") as mask:
        for source, example in _encode_all(files, tokenizer, options, workers, show_progress):
            kept = _admit(source, example, options, report)
            if kept is None:
                continue
            id_bytes = np.asarray(kept.input_ids, dtype=np.int32).tobytes()
            mask_bytes = np.asarray(kept.loss_mask, dtype=np.uint8).tobytes()
            ids.write(id_bytes)
            mask.write(mask_bytes)
            digest.update(id_bytes + mask_bytes)
            lengths.append(len(kept.input_ids))
            supervised.append(sum(kept.loss_mask))
        _sync(ids)
        _sync(mask)
    report.examples, report.tokens, report.supervised = len(supervised), sum(lengths), sum(supervised)
    report.digest = digest.hexdigest()
    _check(report, files, options)
    for name, values in (("offsets", np.cumsum(lengths)), ("supervised", np.asarray(supervised))):
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, values.astype(np.int64))
            _sync(file)
    with (folder / "store.json").open("w") as text:
        json.dump(asdict(report), text)
        _sync(text)


def _admit(source: str, example: Encoded, options: StoreOptions, report: Report) -> Encoded | None:
    """The example as it is trained on, or None where it is left out; counted either way."""
    length = len(example.input_ids)
    report.records += 1
    report.longest = max(report.longest, length)
    if length > options.max_length:
        report.too_long += 1
        if options.truncation == "error":
            raise DataError(
                f"{source}: {length} tokens, longer than max_length={options.max_length}; raise MAX_LENGTH, "
                "or set data.truncation to drop or right"
            )
        if options.truncation == "drop":
            return None
        example = Encoded(example.input_ids[: options.max_length], example.loss_mask[: options.max_length])
    if not any(example.loss_mask):
        report.without_target += 1
        return None
    return example


def _check(report: Report, files: list[Path], options: StoreOptions) -> None:
    if report.examples:
        return
    names = ", ".join(path.name for path in files)
    if report.too_long == report.records:
        cure = f"set MAX_LENGTH to {report.longest}" + (
            ", or data.truncation=right to cut their end" if options.truncation == "drop" else ""
        )
        raise DataError(
            f"{names}: all {report.records} examples are longer than max_length={options.max_length} tokens "
            f"(the longest has {report.longest}) and nothing is left to train on; {cure}"
        )
    raise DataError(f"{names}: no token is supervised in any of the {report.records} records; nothing would be learnt")


def _encode_all(
    files: list[Path], tokenizer: Any, options: StoreOptions, workers: int, show_progress: bool
) -> Iterator[tuple[str, Encoded]]:
    """(source, example) of every record, in the order of the files, rendered by several processes where it pays."""
    conversations = (item for path in files for item in read_conversations(path, options.format))
    first = list(islice(conversations, IN_PROCESS))
    use_pool = workers > 1 and len(first) == IN_PROCESS
    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) if use_pool else nullcontext()
    with pool as executor, _Progress(files, show_progress) as progress:
        encode = partial(_submit, executor) if executor else partial(_run_here, Renderer(tokenizer))
        waiting: list[Any] = []
        for chunk in _chunks(first, conversations):
            waiting.append((chunk, encode(chunk)))
            if len(waiting) > 2 * workers:
                yield from _finish(waiting.pop(0), progress)
        for item in waiting:
            yield from _finish(item, progress)


def _chunks(first: list[Conversation], rest: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    for start in range(0, len(first), CHUNK):
        yield first[start : start + CHUNK]
    rest = iter(rest)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _finish(item: Any, progress: "_Progress") -> Iterator[tuple[str, Encoded]]:
    chunk, result = item
    yield from zip((conversation.source for conversation in chunk), result(), strict=True)
    progress.advance(len(chunk))


_renderer: Renderer


def _start_worker(tokenizer: Any) -> None:
    global _renderer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _renderer = Renderer(tokenizer)


def _work(chunk: list[Conversation]) -> list[Encoded]:
    return _renderer.encode_batch(chunk)


def _submit(executor: ProcessPoolExecutor, chunk: list[Conversation]) -> Any:
    return executor.submit(_work, chunk).result


def _run_here(renderer: Renderer, chunk: list[Conversation]) -> Any:
    return partial(renderer.encode_batch, chunk)


class _Progress:
    """A bar with the records done; how many there are is not known before they are read."""

    def __init__(self, files: list[Path], show: bool):
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        done = TextColumn("{task.completed:,} records")
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), done, TimeElapsedColumn())
        self.bar = Progress(*columns, transient=True, disable=not show)
        self.task = self.bar.add_task("Tokenising " + ", ".join(path.name for path in files[:3]), total=None)

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, records: int) -> None:
        self.bar.advance(self.task, records)


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
