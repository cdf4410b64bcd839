"""Applies a function to chunks of records in several processes, and gives the results in order."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from sft_recipe.distributed.processes import die_with_parent
from sft_recipe.errors import DataError

MIN_CHUNKS = 3  # with fewer chunks starting processes takes longer than it saves

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


@contextmanager
def ordered_results(
    function: Callable[[Chunk], Result], chunks: Iterator[Chunk], workers: int
) -> Iterator[Iterator[tuple[Chunk, Result]]]:
    """Give an iterator over (chunk, function(chunk)), in order, from up to `workers` processes.

    The processes are forked on entry, before the caller starts threads, with the function and all that it refers to.
    Few chunks are computed in this process. Raises DataError for a killed worker.
    """
    first = list(islice(chunks, MIN_CHUNKS))
    workers = workers if len(first) == MIN_CHUNKS else 1
    with _pool(function, workers) as submit:
        yield _results(submit, chain(first, chunks), 2 * workers)


def _results(
    submit: Callable[[Chunk], Callable[[], Result]], chunks: Iterator[Chunk], ahead: int
) -> Iterator[tuple[Chunk, Result]]:
    pending: deque[tuple[Chunk, Callable[[], Result]]] = deque()
    for chunk in chunks:
        pending.append((chunk, submit(chunk)))
        if len(pending) > ahead:
            before, result = pending.popleft()
            yield before, result()
    for before, result in pending:
        yield before, result()


@contextmanager
def _pool(function: Callable[[Chunk], Result], workers: int) -> Iterator[Callable[[Chunk], Callable[[], Result]]]:
    """Give a function that submits a chunk and returns a function that waits for the result."""
    if workers == 1:
        yield lambda chunk: partial(function, chunk)
        return
    try:
        with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (os.getpid(), function)) as pool:
            _fork_now(pool)
            yield lambda chunk: pool.submit(_work, chunk).result
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process was killed, most likely because memory ran out; data.num_workers=1 needs the least"
        ) from None


def _fork_now(pool: ProcessPoolExecutor) -> None:
    """Fork all workers, with the function in their memory, before this process starts threads."""
    name = "TOKENIZERS_PARALLELISM"  # if it is set, tokenizers does not warn about forks
    before = os.environ.setdefault(name, "unset")
    pool.submit(int).result()
    if before == "unset":
        del os.environ[name]


_function_in_worker: Callable[[Any], Any]


def _start_worker(parent: int, function: Callable[[Any], Any]) -> None:
    global _function_in_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to these processes as well: their parent decides
    die_with_parent(parent)  # else it would wait for work forever, with the lock of the unfinished store
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function_in_worker = function


def _work(chunk: Any) -> Any:
    return _function_in_worker(chunk)
