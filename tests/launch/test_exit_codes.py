"""The launcher derives the exit code of a run from its ranks, and shares the cores among them."""

from types import SimpleNamespace

import pytest

from sft_recipe.launch import local


@pytest.mark.parametrize(
    ("codes", "expected", "expected_text"),
    [
        ([2], 2, ""),
        ([75, 75], 75, ""),
        ([1], 1, ""),
        ([-15, 2], 2, ""),
        ([-15, -15, 75], 75, ""),
        ([-9], 137, "error: rank 0 of this machine was killed by SIGKILL (out of memory?)\n"),
        ([-15, -11], 139, "error: rank 1 of this machine was killed by SIGSEGV\n"),
        ([1, -9], 137, "error: rank 1 of this machine was killed by SIGKILL (out of memory?)\n"),
        ([1, (-9, 30)], 1, ""),  # by torchrun, since it did not end by itself after rank 0 had failed
        ([-15, -15], 143, ""),
    ],
)
def test_exit_code_is_that_of_the_first_failed_rank(capsys, codes, expected, expected_text):
    failures = {}
    for rank, code in enumerate(codes):
        code, later = code if isinstance(code, tuple) else (code, 0)
        failures[rank] = SimpleNamespace(local_rank=rank, exitcode=code, timestamp=1000 + later)
    assert local._exit_code(failures) == expected
    assert capsys.readouterr().err == expected_text


def test_ranks_share_the_cores_by_default(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    for ranks, threads in [(1, "8"), (3, "2"), (16, "1")]:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        local._set_threads(ranks)
        assert local.os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    local._set_threads(1)
    assert local.os.environ["OMP_NUM_THREADS"] == "5"
