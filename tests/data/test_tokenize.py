"""Several processes tokenize like one, and killed processes leave nothing behind that is used."""

import os
import signal
import time
from multiprocessing import get_context

import psutil
import pytest

from sft_recipe.data import pipeline, store_writer, tokenize
from sft_recipe.errors import DataError
from tests.data.stores import FILES, RECORDS, build, cache_contents, encoded, examples, store_names, write
from tests.support import tiny


def test_several_processes_write_the_same_bytes_as_one(many, tokenizer, tmp_path, pools):
    one = build(many, tokenizer, tmp_path / "one", workers=1, max_length=300)
    assert pools == []
    several = build(many, tokenizer, tmp_path / "several", workers=2, max_length=300)
    assert pools == [2]
    assert 0 < one.report.too_long < 60
    for name in FILES:
        assert (one.folder / name).read_bytes() == (several.folder / name).read_bytes(), name


def test_few_records_start_no_processes(data, tokenizer, cache_dir, pools):
    build(data, tokenizer, cache_dir, workers=2)
    assert pools == []


def test_errors_in_workers_are_reported_as_in_one_process(many, cache_dir, pools, monkeypatch):
    refusing = "{% if '41' in messages[0]['content'] %}{{ raise_exception('no 41') }}{% endif %}" + tiny.CHATML
    with pytest.raises(DataError, match="many.json, record 42.*no 41"):
        build(many, tiny.build_tokenizer(refusing), cache_dir, workers=2)
    assert pools == [2]
    assert cache_contents(cache_dir) == ["tokens"]


def test_concurrent_builds_publish_one_store(data, tokenizer, cache_dir, monkeypatch):
    """Each waits for the other with its build all but done, so that both publish the same store."""
    fork = get_context("fork")
    barrier, fingerprints = fork.Barrier(2), fork.Queue()
    check = pipeline._check_not_empty

    def check_together(*args):
        check(*args)
        barrier.wait(timeout=600)

    def build_and_report():
        store = build(data, tokenizer, cache_dir)
        fingerprints.put((store.fingerprint, examples(store)))

    monkeypatch.setattr(pipeline, "_check_not_empty", check_together)
    builders = [fork.Process(target=build_and_report) for _ in range(2)]
    for builder in builders:
        builder.start()
    first, second = (fingerprints.get(timeout=600) for _ in builders)
    for builder in builders:
        builder.join(timeout=600)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert first == second
    assert first[1] == encoded(tokenizer, data)
    assert len(store_names(cache_dir)) == 1


def test_killed_build_is_ignored_and_removed_by_the_next(many, tokenizer, cache_dir):
    """SIGKILL after each of the writes of a build."""
    fork = get_context("fork")
    sync = store_writer.sync
    for at in range(6):
        calls = iter(range(10))

        def dying(file, at=at, calls=calls):
            sync(file)
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def run(dying=dying):
            store_writer.sync = dying
            build(many, tokenizer, cache_dir)

        process = fork.Process(target=run)
        process.start()
        process.join(timeout=600)
        assert process.exitcode == -signal.SIGKILL
        assert len([name for name in store_names(cache_dir) if "partial" in name]) == 1
    assert examples(build(many, tokenizer, cache_dir)) == encoded(tokenizer, many)
    assert len(store_names(cache_dir)) == 1


def test_running_build_is_not_removed(data, tokenizer, cache_dir, tmp_path, monkeypatch):
    """Another store is built, by another process as far as locks can tell, in the middle of this one."""
    other = write(tmp_path / "b.json", RECORDS[:2])
    check = pipeline._check_not_empty

    def check_while_another_builds(*args):
        monkeypatch.setattr(pipeline, "_check_not_empty", check)
        build(other, tokenizer, cache_dir)
        check(*args)

    monkeypatch.setattr(pipeline, "_check_not_empty", check_while_another_builds)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)
    assert len(store_names(cache_dir)) == 2


def test_build_that_holds_no_lock_yet_is_not_removed(data, tokenizer, cache_dir, tmp_path, monkeypatch):
    """Another store is built between the creation of the folder and its lock."""
    other, real = write(tmp_path / "b.json", RECORDS[:2]), store_writer.locked

    def locked_after_another_build(path, wait=True):
        monkeypatch.setattr(store_writer, "locked", real)
        build(other, tokenizer, cache_dir)
        return real(path, wait)

    monkeypatch.setattr(store_writer, "locked", locked_after_another_build)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)
    assert len(store_names(cache_dir)) == 2


def test_store_that_another_build_has_replaced_is_kept(data, tokenizer, cache_dir, monkeypatch):
    """Two builds find the same damaged store, and one replaces it before the other does."""
    folder, real = build(data, tokenizer, cache_dir).folder, store_writer.shutil.rmtree
    (folder / "store.json").unlink()

    def removed_after_another_build(path, *args, **kwargs):
        if path.name.endswith(".damaged"):
            monkeypatch.setattr(store_writer.shutil, "rmtree", real)
            build(data, tokenizer, cache_dir)
        real(path, *args, **kwargs)

    monkeypatch.setattr(store_writer.shutil, "rmtree", removed_after_another_build)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)
    assert store_names(cache_dir) == [folder.name]


def test_workers_are_as_many_as_the_cores_that_this_process_may_use(many, tokenizer, cache_dir, pools, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    build(many, tokenizer, cache_dir, workers=None)
    assert pools == [2]


def test_killed_worker_is_a_data_error(many, tokenizer, cache_dir, pools, monkeypatch):
    monkeypatch.setattr(tokenize, "_admit", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="a tokenizing process was killed.*data.num_workers=1"):
        build(many, tokenizer, cache_dir, workers=2)
    assert cache_contents(cache_dir) == ["tokens"]


def test_workers_die_with_the_building_process(many, tokenizer, cache_dir, pools, monkeypatch):
    """They would wait for work for ever, and hold the lock of the unfinished store."""
    fork = get_context("fork")
    workers = fork.Queue()

    def report(*_):
        workers.put(os.getpid())
        time.sleep(600)

    def run():
        monkeypatch.setattr(tokenize, "_admit", report)
        build(many, tokenizer, cache_dir, workers=2)

    process = fork.Process(target=run)
    process.start()
    found = {workers.get(timeout=600), workers.get(timeout=600)}
    assert process.pid not in found
    process.kill()
    process.join(timeout=600)
    end = time.monotonic() + 600
    while any(map(is_alive, found)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in found if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
