"""A preparation that is interrupted continues where it was, and its store equals that of one that was not."""

import os
import signal
import time
from multiprocessing import get_context

import pytest

from sft_recipe.data import store_writer, tokenize
from sft_recipe.data.store_writer import PROGRESS, StoreWriter
from sft_recipe.errors import DataError
from tests.data.stores import FILES, build, store_names, write

CHUNKS = 20  # of the file `many`, with three records each


@pytest.fixture(autouse=True)
def always_saved(monkeypatch):
    monkeypatch.setattr(store_writer, "SAVE_INTERVAL_S", -1.0)


@pytest.fixture
def encoded_chunks(monkeypatch):
    """Counts the chunks that are encoded in this process."""
    counted, encode = [], tokenize._encode

    def counting(chunk, *args):
        counted.append(len(chunk))
        return encode(chunk, *args)

    monkeypatch.setattr(tokenize, "_encode", counting)
    return counted


def interrupt_after(monkeypatch, count, stop=KeyboardInterrupt):
    calls, add = iter(range(1000)), StoreWriter.add

    def adding(self, number, chunk):
        if next(calls) == count:
            raise stop
        add(self, number, chunk)

    monkeypatch.setattr(StoreWriter, "add", adding)


def contents(store):
    return [(store.folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("count", [1, 7, CHUNKS - 1])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_build_continues(
    many, tokenizer, cache_dir, tmp_path, monkeypatch, pools, encoded_chunks, capfd, count, workers
):
    expected = build(many, tokenizer, tmp_path / "other")
    with monkeypatch.context() as context:
        interrupt_after(context, count)
        with pytest.raises(KeyboardInterrupt):
            build(many, tokenizer, cache_dir, workers)
    assert len(store_names(cache_dir)) == 1
    encoded_chunks.clear()
    store = build(many, tokenizer, cache_dir, workers)
    assert contents(store) == contents(expected) and store.report == expected.report
    assert store_names(cache_dir) == [store.folder.name]
    assert f"continuing after {3 * count} records" in capfd.readouterr().err
    if workers == 1:
        assert len(encoded_chunks) == CHUNKS - count


def test_several_interruptions_with_bad_records(tokenizer, cache_dir, tmp_path, monkeypatch, pools):
    records = [{"prompt": f"{n}?", "response": f"{n}." if n % 4 else ""} for n in range(50)]
    data, options = write(tmp_path / "a.json", records), {"on_bad_record": "skip"}
    expected = build(data, tokenizer, tmp_path / "other", **options)
    for count in (2, 3, 1):
        with monkeypatch.context() as context:
            interrupt_after(context, count)
            with pytest.raises(KeyboardInterrupt):
                build(data, tokenizer, cache_dir, **options)
    store = build(data, tokenizer, cache_dir, **options)
    assert contents(store) == contents(expected)
    rejected = [(folder / "rejected.jsonl").read_bytes() for folder in (store.folder, expected.folder)]
    assert rejected[0] == rejected[1] and rejected[0].count(b"\n") == 13


def test_a_killed_build_continues(many, tokenizer, cache_dir, tmp_path, pools):
    """What was written after the progress was saved is cut off."""
    expected = build(many, tokenizer, tmp_path / "other")

    def run():
        calls, save = iter(range(1000)), StoreWriter.save_progress

        def dying(self):
            if next(calls) == 5:
                self._ids.flush(), self._mask.flush(), self._examples.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(self)

        StoreWriter.save_progress = dying
        build(many, tokenizer, cache_dir)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=600)
    assert process.exitcode == -signal.SIGKILL
    assert contents(build(many, tokenizer, cache_dir)) == contents(expected)


def test_damaged_progress_begins_anew(many, tokenizer, cache_dir, tmp_path, monkeypatch, pools):
    with monkeypatch.context() as context:
        interrupt_after(context, 4)
        with pytest.raises(KeyboardInterrupt):
            build(many, tokenizer, cache_dir)
    [progress] = cache_dir.rglob(PROGRESS)
    progress.write_text(progress.read_text()[:-20])
    assert contents(build(many, tokenizer, cache_dir)) == contents(build(many, tokenizer, tmp_path / "other"))


def test_an_error_leaves_nothing(many, tokenizer, cache_dir, monkeypatch, pools):
    interrupt_after(monkeypatch, 4, DataError("no"))
    with pytest.raises(DataError):
        build(many, tokenizer, cache_dir)
    assert store_names(cache_dir) == []


def test_remainders_of_other_stores_are_kept_for_a_week(many, data, tokenizer, cache_dir, monkeypatch, pools):
    with monkeypatch.context() as context:
        interrupt_after(context, 4)
        with pytest.raises(KeyboardInterrupt):
            build(many, tokenizer, cache_dir)
    [remainder] = store_names(cache_dir)
    build(data, tokenizer, cache_dir)
    assert remainder in store_names(cache_dir)
    old = time.time() - store_writer.KEPT_S - 60
    os.utime(cache_dir / "tokens" / remainder / PROGRESS, (old, old))
    build(data, tokenizer, cache_dir, max_length=50)
    assert remainder not in store_names(cache_dir)
