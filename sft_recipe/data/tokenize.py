"""Encodes conversations in chunks, with several processes if there are many; truncates or drops long examples."""

import hashlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context

import numpy as np

from sft_recipe.data.messages import Conversation
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.rendering.renderer import Encoded, Renderer, TooLong
from sft_recipe.data.token_store import StoreOptions, StoreReport
from sft_recipe.distributed.processes import die_with_parent
from sft_recipe.errors import DataError
from sft_recipe.progress import progress_bar

MIN_CHUNKS = 3  # with fewer chunks starting processes takes longer than it saves
BATCH_CHARACTERS = 1 << 21  # content that is rendered and tokenized at a time

Chunk = list[Conversation | BadRecord]


@dataclass
class EncodedChunk:
    """An EncodedChunk has the examples of some records of one file, in order, and the records that were rejected.

    `ids` are the int32 and `mask` the uint8 values of all examples, concatenated. `lengths` and `supervised` (tokens,
    int64) and `digests` (uint64, equal for equal examples) have shape (examples,).
    """

    ids: bytes
    mask: bytes
    lengths: np.ndarray
    supervised: np.ndarray
    digests: np.ndarray
    report: StoreReport
    rejected: list[BadRecord]


def encode_chunks(
    chunks: Iterator[tuple[int, Chunk]],
    renderer: Renderer,
    options: StoreOptions,
    workers: int,
    description: str,
    show_progress: bool,
) -> Iterator[tuple[int, EncodedChunk]]:
    """Yield file number and encoded chunk, in the order of `chunks`, from up to `workers` processes.

    Raises DataError for an example that is too long (if truncation is "error") and for a killed worker.
    """
    first = list(islice(chunks, MIN_CHUNKS))
    workers = workers if len(first) == MIN_CHUNKS else 1
    pending: deque[tuple[int, Callable[[], EncodedChunk]]] = deque()
    # The workers are forked before the progress bar starts its thread.
    with (
        _chunk_encoder(renderer, options, workers) as submit,
        progress_bar(description, "records", show=show_progress) as advance,
    ):
        for number, chunk in chain(first, chunks):
            pending.append((number, submit(chunk)))
            advance(len(chunk))
            if len(pending) > 2 * workers:
                number, result = pending.popleft()
                yield number, result()
        for number, result in pending:
            yield number, result()


def _encode(chunk: Chunk, renderer: Renderer, options: StoreOptions) -> EncodedChunk:
    report = StoreReport(records=len(chunk))
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    rejected = []
    encoded = _encode_all([item for item in chunk if isinstance(item, Conversation)], renderer, options)
    for item in chunk:
        outcome = item.error if isinstance(item, BadRecord) else next(encoded)
        if isinstance(outcome, DataError):
            rejected.append(item if isinstance(item, BadRecord) else BadRecord(outcome, item.as_record()))
            report.rejected[outcome.kind] = report.rejected.get(outcome.kind, 0) + 1
        elif isinstance(item, Conversation):
            report.remarks.add(item)
            if isinstance(outcome, TooLong):
                _count_too_long(item.source, outcome, options, report)
            elif example := _admit(item.source, outcome, options, report):
                ids.append(np.asarray(example.input_ids, dtype=np.int32))
                mask.append(np.frombuffer(bytes(example.loss_mask), dtype=np.uint8))
    lengths = np.asarray([len(values) for values in ids], dtype=np.int64)
    supervised = np.asarray([values.sum() for values in mask], dtype=np.int64)
    digests = np.asarray([digest_of(*example) for example in zip(ids, mask, strict=True)], dtype=np.uint64)
    report.examples, report.tokens, report.supervised = len(ids), int(lengths.sum()), int(supervised.sum())
    return EncodedChunk(_concatenate(ids), _concatenate(mask), lengths, supervised, digests, report, rejected)


def _encode_all(
    conversations: list[Conversation], renderer: Renderer, options: StoreOptions
) -> Iterator[Encoded | DataError | TooLong]:
    limit = None if options.truncation == "right" else options.max_length
    for batch in split_by_size(conversations):
        yield from renderer.encode_within(batch, limit)


def split_by_size(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Yield conversations in lists of at most BATCH_CHARACTERS of content, or of one, since encoding takes memory."""
    batch: list[Conversation] = []
    characters = 0
    for conversation in conversations:
        if batch and characters + conversation.size > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(conversation)
        characters += conversation.size
    if batch:
        yield batch


def _concatenate(arrays: list[np.ndarray]) -> bytes:
    return b"".join(array.tobytes() for array in arrays)


def digest_of(ids: np.ndarray, mask: np.ndarray) -> int:
    """Return a 64-bit digest of `ids` (int32) and `mask` (uint8), which is equal for equal examples."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=8).digest(), "little")


def _admit(source: str, example: Encoded, options: StoreOptions, report: StoreReport) -> Encoded | None:
    """Return the example, truncated if necessary, or None where it is dropped; count it in the report."""
    length = len(example.input_ids)
    report.longest = max(report.longest, length)
    report.special_text += example.has_special_text
    report.dropped_reasoning += example.drops_reasoning
    report.earlier_without_reasoning += example.earlier_without_reasoning
    if length > options.max_length:
        report.too_long += 1
        if options.truncation == "error":
            raise _too_long(source, f"{length}", options)
        if options.truncation == "drop":
            return None
        example = Encoded(example.input_ids[: options.max_length], example.loss_mask[: options.max_length])
    if not any(example.loss_mask):
        report.without_target += 1
        return None
    return example


def _count_too_long(source: str, example: TooLong, options: StoreOptions, report: StoreReport) -> None:
    if options.truncation == "error":
        raise _too_long(source, f"more than {example.least_tokens}", options)
    report.longest = max(report.longest, example.least_tokens)
    report.too_long += 1
    report.untokenized += 1


def _too_long(source: str, length: str, options: StoreOptions) -> DataError:
    return DataError(
        f"{source}: {length} tokens, longer than max_length={options.max_length}; raise MAX_LENGTH, "
        "or set data.truncation to drop or right"
    )


@contextmanager
def _chunk_encoder(
    renderer: Renderer, options: StoreOptions, workers: int
) -> Iterator[Callable[[Chunk], Callable[[], EncodedChunk]]]:
    """Give a function that submits a chunk and returns a function that waits for the result."""
    if workers == 1:
        yield lambda chunk: partial(_encode, chunk, renderer, options)
        return
    _ = renderer.tokenize.token_bytes  # computed once, before the workers are forked
    try:
        with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (os.getpid(), renderer, options)) as pool:
            _fork_now(pool)
            yield lambda chunk: pool.submit(_work, chunk).result
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process was killed, most likely because memory ran out; data.num_workers=1 needs the least"
        ) from None


def _fork_now(pool: ProcessPoolExecutor) -> None:
    """Fork all workers, with the renderer in their memory, before this process starts threads."""
    name = "TOKENIZERS_PARALLELISM"  # if it is set, tokenizers does not warn about forks
    before = os.environ.setdefault(name, "unset")
    pool.submit(int).result()
    if before == "unset":
        del os.environ[name]


_encode_in_worker: Callable[[Chunk], EncodedChunk]


def _start_worker(parent: int, renderer: Renderer, options: StoreOptions) -> None:
    global _encode_in_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to these processes as well: their parent decides
    die_with_parent(parent)  # else it would wait for work forever, with the lock of the unfinished store
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encode_in_worker = partial(_encode, renderer=renderer, options=options)


def _work(chunk: Chunk) -> EncodedChunk:
    return _encode_in_worker(chunk)
