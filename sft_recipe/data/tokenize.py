"""Files -> examples, by all cores: what becomes of each record, in order."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from sft_recipe.data.formats import Columns, read_data
from sft_recipe.data.messages import Conversation
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.rendering.renderer import Encoded, Renderer, RenderOptions
from sft_recipe.distributed.processes import die_with_parent
from sft_recipe.errors import DataError

CHUNK = 512  # records that a worker encodes at a time
IN_PROCESS = 3  # fewer chunks are not worth starting processes for

Items = list[Conversation | BadRecord]


@dataclass(frozen=True)
class StoreOptions:
    """What decides a store's contents besides files and tokenizer; part of its key."""

    format: str = "auto"
    max_length: int = 2048
    truncation: str = "drop"
    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad_record: str = "error"
    render: RenderOptions = RenderOptions()


@dataclass
class Report:
    """What became of the records: counts of examples, lengths in tokens. `rejected` counts bad records by kind."""

    records: int = 0
    examples: int = 0
    too_long: int = 0
    longest: int = 0
    without_target: int = 0
    special_text: int = 0
    dropped_reasoning: int = 0
    tokens: int = 0
    supervised: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples_of_files: list[int] = field(default_factory=list)
    digest: str = ""

    def add(self, part: "Report") -> None:
        """Count what is in a part of the records as well."""
        counts = ("records", "examples", "too_long", "without_target", "special_text", "dropped_reasoning")
        for name in (*counts, "tokens", "supervised"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.longest = max(self.longest, part.longest)
        for kind, count in part.rejected.items():
            self.rejected[kind] = self.rejected.get(kind, 0) + count

    @property
    def kinds(self) -> str:
        """Bad records by kind, in words: `3 empty, 1 roles`."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.rejected.items()))


@dataclass
class Part:
    """What became of some records of one file, in order.

    `ids` are int32 and `mask` uint8, of all examples on end. The arrays have an entry for each example: tokens, and
    supervised ones (int64), and digests (uint64), which are equal where examples are.
    """

    ids: bytes
    mask: bytes
    lengths: np.ndarray
    supervised: np.ndarray
    digests: np.ndarray
    report: Report
    rejected: list[BadRecord]


def _encode(items: Items, renderer: Renderer, options: StoreOptions) -> Part:
    report = Report(records=len(items))
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    rejected = []
    encoded = iter(renderer.encode_batch([item for item in items if isinstance(item, Conversation)]))
    for item in items:
        outcome = item.error if isinstance(item, BadRecord) else next(encoded)
        if isinstance(outcome, DataError):
            rejected.append(item if isinstance(item, BadRecord) else BadRecord(outcome, item.as_record()))
            report.rejected[outcome.kind] = report.rejected.get(outcome.kind, 0) + 1
        elif kept := _admit(item.source, outcome, options, report):  # type: ignore[union-attr]  # a conversation
            ids.append(np.asarray(kept.input_ids, dtype=np.int32))
            mask.append(np.frombuffer(bytes(kept.loss_mask), dtype=np.uint8))
    lengths = np.asarray([len(part) for part in ids], dtype=np.int64)
    supervised = np.asarray([part.sum() for part in mask], dtype=np.int64)
    digests = np.asarray([digest_of(*example) for example in zip(ids, mask, strict=True)], dtype=np.uint64)
    report.examples, report.tokens, report.supervised = len(ids), int(lengths.sum()), int(supervised.sum())
    return Part(_joined(ids), _joined(mask), lengths, supervised, digests, report, rejected)


def _joined(parts: list[np.ndarray]) -> bytes:
    return b"".join(part.tobytes() for part in parts)


def digest_of(ids: np.ndarray, mask: np.ndarray) -> int:
    """Equal for equal examples; `ids` as int32, `mask` as uint8."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=8).digest(), "little")


def _admit(source: str, example: Encoded, options: StoreOptions, report: Report) -> Encoded | None:
    """The example as it is trained on, or None where it is left out; counted either way."""
    length = len(example.input_ids)
    report.longest = max(report.longest, length)
    report.special_text += example.has_special_text
    report.dropped_reasoning += example.drops_reasoning
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


def encode_files(
    files: Sequence[Path],
    renderer: Renderer,
    options: StoreOptions,
    columns: Columns,
    workers: int,
    show_progress: bool,
) -> Iterator[tuple[int, Part]]:
    """Every record in the order of the files, in parts of one file each, by several processes where that pays."""
    chunks = _chunks(files, options, columns)
    first = list(islice(chunks, IN_PROCESS))
    workers = workers if len(first) == IN_PROCESS else 1
    waiting: deque[tuple[int, Callable[[], Part]]] = deque()
    with _submitting(renderer, options, workers) as submit, _Progress(files, show_progress) as progress:
        for number, chunk in chain(first, chunks):
            waiting.append((number, submit(chunk)))
            progress.advance(len(chunk))
            if len(waiting) > 2 * workers:
                number, result = waiting.popleft()
                yield number, result()
        for number, result in waiting:
            yield number, result()


def _chunks(files: Sequence[Path], options: StoreOptions, columns: Columns) -> Iterator[tuple[int, Items]]:
    for number, path in enumerate(files):
        items = read_data(path, options.format, columns)
        while chunk := list(islice(items, CHUNK)):
            yield number, chunk


@contextmanager
def _submitting(
    renderer: Renderer, options: StoreOptions, workers: int
) -> Iterator[Callable[[Items], Callable[[], Part]]]:
    """A function that has a chunk encoded and gives a function that waits for the result."""
    if workers == 1:
        yield lambda chunk: partial(_encode, chunk, renderer, options)
        return
    _ = renderer.tokenize.token_bytes  # once for all workers
    try:
        with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (os.getpid(), renderer, options)) as pool:
            _fork_now(pool)
            yield lambda chunk: pool.submit(_work, chunk).result
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenises was killed, most likely for want of memory; data.num_workers=1 needs the least"
        ) from None


def _fork_now(pool: ProcessPoolExecutor) -> None:
    """All workers at once, with the renderer in their memory, before this process starts threads of its own."""
    name = "TOKENIZERS_PARALLELISM"  # set or not decides whether tokenizers warns of forks
    before = os.environ.setdefault(name, "unset")
    pool.submit(int).result()
    if before == "unset":
        del os.environ[name]


_encode_here: Callable[[Items], Part]


def _start_worker(parent: int, renderer: Renderer, options: StoreOptions) -> None:
    global _encode_here
    die_with_parent(parent)  # else it would wait for ever for work, with the lock of the unfinished store
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encode_here = partial(_encode, renderer=renderer, options=options)


def _work(chunk: Items) -> Part:
    return _encode_here(chunk)


class _Progress:
    """A bar with the records done; how many there are is not known before they are read."""

    def __init__(self, files: Sequence[Path], show: bool):
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
