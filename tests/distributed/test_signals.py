"""A run that is asked to stop or to save does so, and one whose rank dies or hangs ends with the reason."""

import signal
import time

import pytest

from sft_recipe.distributed import signals
from tests.support import tiny
from tests.support.chaos import differences, send_signal_at
from tests.support.runs import metrics
from tests.support.small_run import STEPS, arguments, checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("preemption") / "model", attention_dropout=0.1)


def at(phase, call=1, on_rank=1, **more):
    """A signal to one rank; the others hear of it from that one."""
    return "tests.support.chaos:send_signal_at", {"phase": phase, "on_rank": on_rank, "call": call, **more}


def stop_in_validation(rank: int, call: int) -> None:
    """A setup: validation in several small parts, and a signal to rank 1 after part `call`."""
    from sft_recipe.evaluation import validation as evaluate

    evaluate.MICRO_BATCHES_PER_CALL = 1
    send_signal_at(rank, "validation", on_rank=1, call=call, sends=signal.SIGTERM)


def test_stop_during_validation_is_immediate_and_resumes_bit_for_bit(warm, model, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    extra = ["data.max_length=64", "trainer.save_freq=-1", "trainer.resume_from=auto"]
    parts = f"{__name__}:stop_in_validation"
    assert warm.run(arguments(model, whole, *extra), ranks=2, setup=(parts, {"call": 1000})).code == 0
    run = arguments(model, stopped, *extra)
    end = warm.run(run, ranks=2, setup=(parts, {"call": 3}))  # the first two are before training
    assert end.codes == [75, 75] and "Stopped at step 5" in end.output, end.output
    assert checkpoints(stopped) == ["step_5"]
    assert [row["step"] for row in metrics(stopped / "out")] == [1, 2, 3, 4]  # the fifth lacks its validation loss
    end = warm.run(run, ranks=2, setup=(parts, {"call": 3}))  # after the rest of this validation, in the last one
    assert end.codes == [75, 75] and checkpoints(stopped) == [f"step_{STEPS}", "step_5"]
    assert warm.run(run, ranks=2, setup=(parts, {"call": 1000})).code == 0
    assert not differences(whole / "out", stopped / "out")


def test_max_time_stops_and_saves(warm, model, tmp_path):
    end = warm.run(arguments(model, tmp_path, "trainer.max_time=0.01", "trainer.test_freq=-1"), ranks=2)
    assert end.codes == [75, 75] and checkpoints(tmp_path) == ["step_1"]


def test_sigusr1_saves_and_training_continues(warm, model, tmp_path):
    never = ["trainer.save_freq=-1", "trainer.save_best=false", "trainer.max_ckpt_to_keep=null"]
    run = arguments(model, tmp_path, *never)
    end = warm.run(run, ranks=2, setup=at("optimizer step", call=3, sends=signal.SIGUSR1))
    assert end.code == 0 and checkpoints(tmp_path) == [f"step_{STEPS}", "step_3"], end.output


def test_repeated_signal_is_one_stop(warm, model, tmp_path):
    end = warm.run(arguments(model, tmp_path), ranks=2, setup=at("forward", sends=signal.SIGTERM, times=2))
    assert end.codes == [75, 75] and checkpoints(tmp_path) == ["step_1"], end.output


def stop_twice(rank: int) -> None:
    """A setup: two signals to rank 1 in its first step; the second comes late enough to count."""
    signals.REPEAT_S = 0.0
    send_signal_at(rank, "forward", on_rank=1, call=1, sends=signal.SIGTERM, times=2)


def test_second_signal_exits_at_once(warm, model, tmp_path):
    end = warm.run(arguments(model, tmp_path), ranks=2, setup=(f"{__name__}:stop_twice", {}))
    assert end.codes == [1, 143] and checkpoints(tmp_path) == []
    assert "a peer rank exited" in end.output and "Traceback" not in end.output


@pytest.mark.parametrize("ranks", [1, 2])
def test_second_signal_to_all_ranks_is_reported_once(warm, model, tmp_path, ranks):
    end = warm.run(arguments(model, tmp_path), ranks=ranks, setup=(f"{__name__}:stop_all_twice", {}))
    assert end.codes == [143] * ranks and checkpoints(tmp_path) == []
    assert end.output.count("stopped by SIGTERM without saving: it was the second signal") == 1, end.output


def stop_all_twice(rank: int) -> None:
    """A setup: two signals to every rank in its first step; the second comes late enough to count."""
    signals.REPEAT_S = 0.0
    send_signal_at(rank, "forward", on_rank=rank, call=1, sends=signal.SIGTERM, times=2)


def die_alone(rank: int) -> None:
    """A setup: rank 1 is killed in its second step, and cannot say so."""
    if rank == 1:
        send_signal_at(1, "optimizer step", on_rank=1, call=2, sends=signal.SIGABRT)


def fail_alone(rank: int) -> None:
    """A setup: rank 1 meets what nobody has thought of."""
    from sft_recipe.training.batches import BatchBuilder

    def fail(*_: object) -> None:
        raise ArithmeticError("odd")

    if rank == 1:
        BatchBuilder.build = fail


def fail_with_a_familiar_word(rank: int) -> None:
    """A setup: rank 1 meets an error whose text has words of lost connections."""
    from sft_recipe.training.batches import BatchBuilder

    def fail(*_: object) -> None:
        raise RuntimeError("NCCL is too old; a download was reset by peer")

    if rank == 1:
        BatchBuilder.build = fail


def hang_alone(rank: int) -> None:
    """A setup: rank 1 does not come back from reading the examples of a step, which are read for its check before."""
    from sft_recipe.training.batches import BatchBuilder

    real, calls = BatchBuilder.build, iter(range(2))
    if rank == 1:
        BatchBuilder.build = lambda *given: real(*given) if next(calls) == 0 else time.sleep(1000)


def fall_silent(rank: int) -> None:
    """A setup: rank 1 stops altogether, as on a machine that is gone; silence of a few seconds counts."""
    from sft_recipe.distributed import watchdog

    watchdog.HEARTBEAT_TIMEOUT_S = 4.0
    if rank == 1:
        send_signal_at(1, "optimizer step", on_rank=1, call=2, sends=signal.SIGSTOP)


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        (die_alone, "aborts: a peer rank exited"),
        (fail_alone, "ArithmeticError: odd"),
        (fail_with_a_familiar_word, "RuntimeError: NCCL is too old"),
        (hang_alone, "rank 1 on"),
        (fall_silent, "has sent no heartbeat for"),
    ],
)
def test_rank_that_fails_or_hangs_ends_the_others_with_the_reason(warm, model, tmp_path, setup, says):
    timeout = f"trainer.heartbeat_timeout={15 if setup is hang_alone else 60}"
    run = arguments(model, tmp_path, timeout, "trainer.test_freq=-1")
    end = warm.run(run, ranks=2, setup=(f"{__name__}:{setup.__name__}", {}))
    assert end.codes[0] == 1, end.output
    assert says in end.output, end.output
    if setup is hang_alone:
        assert "hangs: step 1: reading its examples for" in end.output and "in <lambda>" in end.output  # its stack
        assert "while others are at step 1: computing" in end.output
    assert "Connection closed" not in end.output or setup is die_alone
