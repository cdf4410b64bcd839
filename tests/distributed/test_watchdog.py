"""What the ranks' watch must not do; what it must do is shown with whole runs in test_preemption.py."""

import time

import pytest
from torch.distributed import DistBackendError, DistNetworkError

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


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:94, "


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:12345"), True),
        (RuntimeError(f"{GLOO}Read error [127.0.0.1]:12345: Connection reset by peer"), True),
        (DistBackendError(f"{NCCL}remote process exited or there was a network error\nncclRemoteError: A call"), True),
        (DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (DistBackendError("store->get('0') got error: Broken pipe"), True),
        (DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the server crash?"), True),
        (DistBackendError(f"{NCCL}invalid usage\nncclInvalidUsage: Duplicate GPU detected"), False),
        (DistBackendError(f"{NCCL}unhandled cuda error\nncclUnhandledCudaError: Cuda failure 'out of memory'"), False),
        (RuntimeError(f"{GLOO}op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (RuntimeError("NCCL_DEBUG has a bad value"), False),
        (RuntimeError("a download failed: Connection reset by peer"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_only_failed_collectives_tell_that_a_peer_was_lost(error, is_lost):
    assert watch._is_lost_connection(error) == is_lost
