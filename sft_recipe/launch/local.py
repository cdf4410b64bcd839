"""Starts the ranks of this machine: a single rank is forked from this process, several ranks run under torchrun.

A single rank needs no torchrun, whose imports would delay it by seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe import timing
from sft_recipe.distributed.processes import available_cores
from sft_recipe.distributed.rendezvous import record_stop
from sft_recipe.errors import ConfigError, PreflightError, run_command

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from sft_recipe.config.schema import Config, TrainerConfig

DEFAULT_PORT = 29500
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# The C library reads them when a process starts, so that train.sh sets them on machines without a GPU, with the reason.
HEAP_SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"}
FIRST_FAILURES_S = 10  # torchrun gives the other ranks 30 s to end after a failure; then it kills them


def start_ranks(config: Config) -> int:
    """Run this machine's ranks to their end with a composed configuration; returns the exit code of the run."""
    _set_threads(config.trainer.n_gpus_per_node)
    _set_allocator()
    timing.mark("launcher: configuration")
    if config.trainer.world_size == 1 and not config.trainer.auto_restart:
        return _fork(config)
    with _machines(config.trainer), resolved_file(config) as path:
        return _torchrun(torchrun_args(config.trainer, [f"--resolved-config={path}"]))


def main() -> int:
    """Run this machine's ranks with the configuration that another launcher writes to standard input, as JSON."""
    from sft_recipe.config.compose import from_json

    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))  # Ray blocks SIGINT
    return run_command(lambda: start_ranks(from_json(sys.stdin.read())))


def torchrun_args(trainer: TrainerConfig, arguments: list[str]) -> list[str]:
    """Return the arguments of the torchrun command that runs sft_recipe.main_sft with `arguments`."""
    if trainer.nnodes == 1 and trainer.master_port is None:
        rendezvous = ["--standalone"]
    else:
        port = trainer.master_port or DEFAULT_PORT
        rendezvous = [
            f"--node_rank={trainer.node_rank}",
            f"--master_addr={trainer.master_addr}",
            f"--master_port={port}",
        ]
    return [
        f"--nnodes={trainer.nnodes}",
        f"--nproc_per_node={trainer.n_gpus_per_node}",
        *rendezvous,
        *([f"--max_restarts={trainer.auto_restart}"] if trainer.auto_restart else []),
        "-m",
        "sft_recipe.main_sft",
        *arguments,
    ]


@contextmanager
def _machines(trainer: TrainerConfig) -> Iterator[None]:
    """Meet the other machines of the run; machine 0 serves the store in which they met to the end."""
    if trainer.nnodes == 1:
        yield
        return
    from sft_recipe.distributed.machines import meet, report_failure
    from sft_recipe.distributed.network import choose_interface

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a warning for each connection without reverse DNS
    port = trainer.master_port or DEFAULT_PORT
    try:
        choose_interface(trainer.master_addr, port, is_master=trainer.node_rank == 0)
    except ConfigError as error:
        report_failure(trainer, port, f"{socket.gethostname()}: {error}")
        raise
    store = meet(trainer, port)
    yield
    del store


@contextmanager
def resolved_file(config: Config) -> Iterator[Path]:
    """Write the configuration for the ranks to a file that only this user can read, until they have ended.

    It is the file of the argument `--resolved-config`, which load_for_rank reads.
    """
    from sft_recipe.config.compose import to_json

    with tempfile.TemporaryDirectory(prefix="sft_recipe-") as folder:  # mode 0700
        path = Path(folder) / "config.json"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(to_json(config))
        yield path


def _fork(config: Config) -> int:
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
        del os.environ[name]  # left from another program: this rank is the only one
    main_sft.start([], launcher, config)


def _set_threads(ranks: int) -> None:
    """Share all cores among the ranks: torchrun would give each of several ranks one thread."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))


def _set_allocator() -> None:
    """Let blocks of GPU memory grow, which fragments less, unless the user has configured PyTorch's allocator."""
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def _torchrun(arguments: list[str]) -> int:
    """Run torchrun in this process, so that a rank's exit code and message reach the user unchanged."""
    import logging

    with timing.paused_gc():
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    timing.mark("launcher: torchrun")
    timing.export_timings()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="sft_recipe-") as log_dir:  # the ranks meet in it
            _forward_signals(Path(log_dir))
            # The ranks handle signals themselves (finish the step, save, exit); torchrun's would end them early.
            run(parse_args([f"--log_dir={log_dir}", "--signals-to-handle=SIGQUIT", *arguments]))
    except ChildFailedError as error:
        return _exit_code(error.failures)
    except (OSError, ValueError, RuntimeError) as error:
        raise PreflightError(f"torchrun could not start: {error}") from None
    return 0


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """Return the exit code of the first rank that failed by itself, else 128 plus the signal that killed a rank.

    Ranks that torchrun ends later, because another one failed, do not count.
    """
    first = min(failure.timestamp for failure in failures.values())
    early = [failure for failure in failures.values() if failure.timestamp < first + FIRST_FAILURES_S]
    chosen = [failure.exitcode for failure in early if failure.exitcode > 1]
    killed = [failure for failure in early if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM]
    if chosen or not killed:
        codes = chosen or [failure.exitcode for failure in early]
        return next((code for code in codes if code > 0), 128 - codes[0])
    return _report_killed(killed[0].local_rank, -killed[0].exitcode)


def _report_killed(rank: int, number: int) -> int:
    """Print that the signal `number` killed a rank; returns 128 + `number`."""
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    print(f"error: rank {rank} of this machine was killed by {signal.Signals(number).name}{hint}", file=sys.stderr)
    return 128 + number


def _forward_signals(log_dir: Path | None = None) -> None:
    """Forward signals to the ranks; with torchrun's `log_dir` a stop also ends the restarts."""
    import psutil

    def forward(number: int, _frame: object) -> None:
        if log_dir and number != signal.SIGUSR1:
            record_stop(log_dir, 128 + number)
        ranks = psutil.Process().children()
        for rank in ranks:
            rank.send_signal(number)
        if not ranks and number != signal.SIGUSR1:
            print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
            sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)


if __name__ == "__main__":
    sys.exit(main())
