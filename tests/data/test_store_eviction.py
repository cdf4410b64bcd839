"""Token stores take a limited part of the disk; the least recently used are removed, and nothing that may be in use."""

import os
import shutil
import time
from collections import namedtuple

import pytest

from sft_recipe.data import store_eviction
from sft_recipe.data.store_eviction import evict_stores
from sft_recipe.data.token_store import REPORT, TokenStore
from tests.data.stores import build, encoded, examples, store_names, write

HOUR = 3600


@pytest.fixture
def disk(monkeypatch):
    """Sets the size of the disk in bytes."""
    usage = namedtuple("usage", "total used free")
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size, 0, 0))


def fake_store(folder, name, size, hours):
    (folder / name).mkdir(parents=True)
    (folder / name / REPORT).write_bytes(b"x" * size)
    used = time.time() - hours * HOUR
    os.utime(folder / name / REPORT, (used, used))


@pytest.mark.parametrize(
    ("total", "removed"),
    [
        (10_000, []),
        (1_500, []),
        (1_499, ["oldest"]),
        (1_000, ["oldest"]),
        (999, ["oldest", "old"]),
        (1, ["oldest", "old"]),
    ],
)
def test_least_recently_used_stores_go_first(tmp_path, disk, total, removed):
    for name, hours in (("recent", 0.5), ("old", 30), ("oldest", 40)):
        fake_store(tmp_path, name, 100, hours)
    (tmp_path / "building.partial-1").mkdir()
    disk(total)
    assert evict_stores(tmp_path) == removed
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {"recent", "old", "oldest", "building.partial-1"} - set(removed)
    )


def test_opening_a_store_counts_as_use(data, tokenizer, cache_dir, tmp_path, disk, capsys):
    first = build(data, tokenizer, cache_dir)
    second = build(data, tokenizer, cache_dir, max_length=60)
    old = time.time() - 5 * HOUR
    for store in (first, second):
        os.utime(store.folder / REPORT, (old, old))
    build(data, tokenizer, cache_dir)  # opens the first one
    disk(1)
    third = build(write(tmp_path / "b.json", [{"prompt": "Hi", "response": "Hello."}]), tokenizer, cache_dir)
    assert sorted(store_names(cache_dir)) == sorted([first.folder.name, third.folder.name])
    assert "removed 1 token store" in capsys.readouterr().err
    assert examples(TokenStore.open(first.folder)) == encoded(tokenizer, data)


def test_an_evicted_store_that_is_open_stays_usable(data, tokenizer, cache_dir, monkeypatch, disk):
    store = build(data, tokenizer, cache_dir)
    monkeypatch.setattr(store_eviction, "RECENT_S", 0)
    disk(1)
    assert evict_stores(cache_dir / "tokens") == [store.folder.name]
    assert examples(store) == encoded(tokenizer, data)
    assert examples(build(data, tokenizer, cache_dir / "again")) == encoded(tokenizer, data)
