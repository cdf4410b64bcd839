"""What the ranks' watch must not do; what it must do is shown with whole runs in test_preemption.py."""

import time

import pytest

from sft_recipe.distributed import watchdog as watch
from sft_recipe.errors import DataError


def test_rank_does_not_exit_because_of_its_own_failure_record(monkeypatch):
    """The thread reads the run's end just after its own rank has written it, which then reports the error itself."""
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    left, read = [], watch.Watchdog._read

    def read_late(self, key):
        time.sleep(0.3 if key == watch.FAILURE_KEY else 0)
        return read(self, key)

    monkeypatch.setattr(watch.Watchdog, "_read", read_late)
    monkeypatch.setattr(watch.os, "_exit", left.append)
    with pytest.raises(DataError), watch.Watchdog(0, 1, None).propagate_failures():
        raise DataError("a record is bad")
    time.sleep(1)
    assert left == []
