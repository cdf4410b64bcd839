"""Starts the ranks of this machine: one is forked from this process, several run under torchrun.

A single rank needs no torchrun, whose imports would delay it by seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sft_recipe import timing
from sft_recipe.engine.import_stubs import quick_imports
from sft_recipe.errors import PreflightError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from sft_recipe.config.schema import TrainerConfig

DEFAULT_PORT = 29500
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS_TO_END_OTHERS = 10  # torchrun gives ranks 30 to end after one has failed; then it kills them


def start_ranks(trainer: TrainerConfig, overrides: list[str], config_args: list[str]) -> int:
    """Run this machine's ranks to their end; returns the exit code of the run."""
    _set_threads(trainer.n_gpus_per_node)
    timing.mark("launcher: configuration")
    if trainer.world_size == 1 and not trainer.auto_restart:
        return _fork([*config_args, *overrides])
    return _torchrun(torchrun_args(trainer, overrides, config_args))


def torchrun_args(trainer: TrainerConfig, overrides: list[str], config_args: list[str]) -> list[str]:
    """Arguments of the torchrun command that runs this configuration's `trainer` part."""
    if trainer.nnodes == 1 and trainer.master_port is None:
        place = ["--standalone"]
    else:
        port = trainer.master_port or DEFAULT_PORT
        place = [f"--node_rank={trainer.node_rank}", f"--master_addr={trainer.master_addr}", f"--master_port={port}"]
    return [
        f"--nnodes={trainer.nnodes}",
        f"--nproc_per_node={trainer.n_gpus_per_node}",
        *place,
        *([f"--max_restarts={trainer.auto_restart}"] if trainer.auto_restart else []),
        "-m",
        "sft_recipe.main_sft",
        *config_args,
        *overrides,
    ]


def _fork(arguments: list[str]) -> int:
    """Run the only rank in a child of this process; returns its exit code."""
    timing.export_timings()
    _forward_signals()
    launcher, rank = os.getpid(), os.fork()
    if rank:
        code = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
        return _report_killed(0, -code) if code < 0 else code
    from sft_recipe import main_sft

    os.setsid()  # a Ctrl-C reaches it once, from the launcher
    for name in [name for name in os.environ if name in RANK_VARIABLES or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # of something else: this rank is alone
    main_sft.start(arguments, launcher)


def _set_threads(ranks: int) -> None:
    """torchrun would give each of several ranks one thread; on a CPU they should share all cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


def _torchrun(arguments: list[str]) -> int:
    """Run torchrun in this process, so that a rank's exit code and message reach the user as they are."""
    import logging

    with quick_imports():
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    timing.mark("launcher: torchrun")
    timing.export_timings()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    _forward_signals()
    # The ranks answer signals themselves (finish the step, save, exit); torchrun's own handlers would cut that short.
    options = parse_args(["--signals-to-handle=SIGQUIT", *arguments])
    try:
        run(options)
    except ChildFailedError as error:
        return _exit_code(error.failures)
    except (OSError, ValueError, RuntimeError) as error:
        raise PreflightError(f"torchrun could not start: {error}") from None
    return 0


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """What ended the run: a rank's own code where it has a meaning, else the signal that killed a rank.

    Ranks that torchrun ends later, because another one failed, say nothing.
    """
    first = min(failure.timestamp for failure in failures.values())
    early = [failure for failure in failures.values() if failure.timestamp < first + SECONDS_TO_END_OTHERS]
    own = [failure.exitcode for failure in early if failure.exitcode > 1]
    killed = [failure for failure in early if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM]
    if own or not killed:
        codes = own or [failure.exitcode for failure in early]
        return next((code for code in codes if code > 0), 128 - codes[0])
    return _report_killed(killed[0].local_rank, -killed[0].exitcode)


def _report_killed(rank: int, number: int) -> int:
    """Of a rank that the signal `number` ended; returns the exit code that says so."""
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    print(f"error: rank {rank} of this machine was killed by {signal.Signals(number).name}{hint}", file=sys.stderr)
    return 128 + number


def _forward_signals() -> None:
    import psutil

    def forward(number: int, _frame: object) -> None:
        ranks = psutil.Process().children()
        for rank in ranks:
            rank.send_signal(number)
        if not ranks and number != signal.SIGUSR1:
            sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
