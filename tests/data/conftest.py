"""Fixtures of the tests that build token stores."""

from pathlib import Path

import pytest

from sft_recipe.data import pipeline, worker_pool
from tests.data.stores import RECORDS, write


@pytest.fixture
def data(tmp_path) -> Path:
    """A file with RECORDS."""
    return write(tmp_path / "data.json", RECORDS)


@pytest.fixture
def cache_dir(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def many(tmp_path) -> Path:
    """Records of very different lengths, so that workers finish out of order."""
    records = [{"prompt": f"What is {n}?", "response": f"{n} is fine. " * (1 + 37 * n % 61)} for n in range(60)]
    return write(tmp_path / "many.json", records)


@pytest.fixture
def pools(monkeypatch) -> list[int]:
    """Processes pay from nine records on; the list holds the number of workers of each pool that was started."""
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 3)
    monkeypatch.setattr(worker_pool, "MIN_CHUNKS", 3)
    started: list[int] = []
    pool = worker_pool.ProcessPoolExecutor

    def counting(workers, *args):
        started.append(workers)
        return pool(workers, *args)

    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", counting)
    return started
