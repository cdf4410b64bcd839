"""Shared helpers: a file has its old contents or its new ones, never a part; locks and digests."""

import hashlib
import multiprocessing
from pathlib import Path

import pytest

from sft_recipe.files import atomic_write, digest, digest_number, locked, update_digest, write_text


def test_a_file_is_replaced_at_once_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_may_have_the_same_process_id(tmp_path):
    """As in two containers that share a folder."""
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_is_that_of_all_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("sft_recipe.files.BLOCK", 10)
    (tmp_path / "a").write_bytes(bytes(range(101)))
    found = hashlib.sha256()
    assert update_digest(found, tmp_path / "a") == 101
    assert found.digest() == hashlib.sha256(bytes(range(101))).digest()


def test_digests_are_blake2b_of_bytes_and_files_in_their_order(tmp_path):
    (tmp_path / "a").write_bytes(b"middle")
    expected = hashlib.blake2b(b"begin middle end".replace(b" ", b""), digest_size=4)
    assert digest(b"begin", tmp_path / "a", b"end", size=4) == expected.hexdigest()
    assert digest(b"end", tmp_path / "a", b"begin", size=4) != expected.hexdigest()
    assert digest_number(b"begin").to_bytes(8, "little").hex() == digest(b"begin")


def _hold(path: Path, ready, done) -> None:
    with locked(path):
        ready.set()
        done.wait()


def test_a_lock_excludes_other_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", ready, done))
    holder.start()
    ready.wait()
    with pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pass
    done.set()
    with locked(tmp_path / "lock"):  # waits for the holder's end
        pass
    holder.join()
