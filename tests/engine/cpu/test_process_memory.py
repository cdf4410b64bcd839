"""The memory of a CPU rank: what it allocates counts, at its peak too, and files that it maps do not."""

import mmap
import os
import signal
import time

import numpy as np

from sft_recipe.engine.cpu.process_memory import INTERVAL_S, PeakMemory, peak_memory, process_memory

MIB = 2**20


def allocate(size):
    """Return new memory, filled: an allocator may give what was free before, and keep what becomes free."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(b"1" * size)
    return block


def test_mapped_files_do_not_count(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(64 * MIB))
    before = process_memory()
    mapped = np.memmap(tmp_path / "weights", dtype=np.uint8, mode="r")
    assert mapped.sum() == 0  # all of its pages are resident
    assert process_memory() - before < 16 * MIB
    block = allocate(64 * MIB)
    assert process_memory() - before > len(block) - 16 * MIB


def test_the_peak_stays_when_memory_is_free_again():
    peak = PeakMemory()
    block = allocate(256 * MIB)
    highest = peak.read()
    block.close()
    assert process_memory() < highest - 128 * MIB
    assert peak.read() == highest


def test_the_thread_sees_a_peak_that_nobody_asks_for():
    peak = PeakMemory()
    before = process_memory()
    block = allocate(256 * MIB)
    deadline = time.monotonic() + 30
    while peak._peak < before + len(block) / 2 and time.monotonic() < deadline:
        time.sleep(INTERVAL_S)
    block.close()
    assert peak.read() >= before + 128 * MIB


def test_a_forked_process_has_a_peak_that_is_its_alone():
    """The fork happens while the thread reads: the child would wait for the thread's lock for ever."""
    lock = peak_memory()._lock
    lock.acquire()
    child = os.fork()
    if child:
        lock.release()
    else:
        signal.alarm(30)
        code = 1
        try:
            peak = peak_memory()
            before, block = peak.read(), allocate(256 * MIB)
            while peak._peak < before + len(block) / 2:
                time.sleep(INTERVAL_S)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
