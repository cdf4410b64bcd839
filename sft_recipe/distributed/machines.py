"""The machines of a run meet before any of them starts its ranks: who is missing, and whether they fit together."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from sft_recipe.distributed.rendezvous import FIRST_ATTEMPT, attempt, start_ticks
from sft_recipe.errors import ConfigError, PreflightError

if TYPE_CHECKING:
    from torch.distributed import Store

    from sft_recipe.config.schema import TrainerConfig

POLL_S = 0.5
REMINDER_S = 30.0  # between two messages about what is missing
CONNECT_S = 2.0  # for one attempt to reach machine 0
LINGER_S = 3.0  # for which machine 0 serves the store after a failure, so that the others read it
REPORT_S = 30.0  # for which a machine that cannot take part tries to report that
FAILURE_KEY = "failure"
FIT = {"nnodes": "NNODES", "n_gpus_per_node": "N_GPUS"}  # what all machines have in common


def meet(trainer: TrainerConfig, port: int) -> Store:
    """Wait until all machines of the run are there; returns the store in which they met, to be kept while ranks run.

    Machine 0 serves it at MASTER_ADDR and `port`. Says at once and every 30 seconds what is missing. A machine that
    was started again joins the next attempt of the others. Raises ConfigError on all machines for two with the same
    number and for different numbers of machines or ranks, PreflightError after `trainer.start_timeout` seconds.
    """
    where, is_master = f"{trainer.master_addr}:{port}", trainer.node_rank == 0
    waiting = _Waiting(where, trainer.start_timeout)
    while not is_master and not _is_reachable(trainer.master_addr, port):
        waiting.wait("machine 0")
    try:
        store = _open_store(trainer.master_addr, port, is_master)
        is_again = _register(store, trainer)
        while missing := _missing(store, trainer):
            waiting.wait(f"{len(missing)} of {trainer.nnodes} machines (NODE_RANK={', '.join(missing)})")
        if is_again:
            _await_next_attempt(store, trainer.node_rank, waiting)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        action = "cannot be served; choose another MASTER_PORT" if is_master else "is gone: machine 0 has ended"
        raise PreflightError(f"the meeting point of the machines, {where}, {action} ({reason})") from None
    except ConfigError:
        if is_master:
            time.sleep(LINGER_S)
        raise
    return store


def report_failure(trainer: TrainerConfig, port: int, reason: str) -> None:
    """End the waiting of the others because this machine cannot take part; machine 0 may still be starting."""
    if trainer.node_rank == 0:
        return
    end = time.monotonic() + REPORT_S
    with suppress(RuntimeError, socket.gaierror):
        socket.getaddrinfo(trainer.master_addr, port)
        while not _is_reachable(trainer.master_addr, port):
            if time.monotonic() > end:
                return
            time.sleep(POLL_S)
        _open_store(trainer.master_addr, port, is_master=False).compare_set(FAILURE_KEY, "", reason)


def record_attempt(store: Store) -> None:
    """Record which attempt this machine's ranks belong to; for local rank 0, with a connection to the same server."""
    _of_machines(store).set(f"attempt/{os.environ.get('GROUP_RANK', '0')}", str(attempt()))


def _open_store(master_addr: str, port: int, is_master: bool) -> Store:
    from torch.distributed import TCPStore

    return _of_machines(
        TCPStore(
            master_addr,
            port,
            is_master=is_master,
            wait_for_workers=False,
            multi_tenant=True,  # torchrun, in this process, uses the same server
            timeout=timedelta(seconds=REMINDER_S),
        )
    )


def _of_machines(store: Store) -> Store:
    from torch.distributed import PrefixStore

    return PrefixStore("sft_recipe/machines", store)


def _is_reachable(master_addr: str, port: int) -> bool:
    """Return whether something listens there; a store's client would print a C++ warning for each attempt."""
    with suppress(OSError), socket.create_connection((master_addr, port), timeout=CONNECT_S):
        return True
    return False


def _register(store: Store, trainer: TrainerConfig) -> bool:
    """Enter this machine under its number; returns whether it takes the place of a process that has ended."""
    key, started = f"machine/{trainer.node_rank}", start_ticks(os.getpid())
    own = {"host": socket.gethostname(), "process": os.getpid(), "started": started, "id": f"{time.time_ns()}"}
    own |= {name: getattr(trainer, name) for name in FIT}
    found = json.loads(store.compare_set(key, "", json.dumps(own)))
    if found == own:
        return False
    if found["host"] != own["host"] or _is_running(found):
        _fail(store, f"two machines have NODE_RANK={trainer.node_rank}: {found['host']} and {own['host']}")
    store.set(key, json.dumps(own))
    return True


def _is_running(process: dict[str, Any]) -> bool:
    with suppress(OSError):
        return start_ticks(process["process"]) == process["started"]
    return False


def _missing(store: Store, trainer: TrainerConfig) -> list[str]:
    """Return the numbers of the machines that are not there yet. Raises ConfigError for those that do not fit."""
    missing = []
    for node in range(trainer.nnodes):
        if not store.check([f"machine/{node}"]):
            missing.append(str(node))
            continue
        found = json.loads(store.get(f"machine/{node}"))
        if different := [key for key in FIT if found[key] != getattr(trainer, key)]:
            values = "; ".join(f"{FIT[key]} is {found[key]} and {getattr(trainer, key)}" for key in different)
            _fail(store, f"{found['host']} and {socket.gethostname()} do not fit together: {values}")
    if store.check([FAILURE_KEY]):
        raise ConfigError(store.get(FAILURE_KEY).decode())
    return missing


def _fail(store: Store, reason: str) -> NoReturn:
    """Raise the first failure that a machine has recorded, on all of them."""
    raise ConfigError(store.compare_set(FAILURE_KEY, "", reason).decode())


def _await_next_attempt(store: Store, node_rank: int, waiting: _Waiting) -> None:
    """Let the ranks of this machine join the attempt that follows the one of their predecessors."""

    def recorded(node: int) -> int:
        return int(store.get(f"attempt/{node}")) if store.check([f"attempt/{node}"]) else -1

    previous = recorded(node_rank)
    while recorded(0) <= previous:
        waiting.wait("the other machines to restart their ranks (--auto_restart)")
    os.environ[FIRST_ATTEMPT] = str(recorded(0))


class _Waiting:
    """Waits with messages, the first at once; the limit is `timeout` seconds from its creation, or None."""

    def __init__(self, where: str, timeout: float | None):
        self.where, self.timeout = where, timeout
        self.began = time.monotonic()
        self.next_message = self.began

    def wait(self, what: str) -> None:
        """Wait a moment for `what`. Raises PreflightError at the limit."""
        waited = time.monotonic() - self.began
        if self.timeout is not None and waited > self.timeout:
            raise PreflightError(
                f"waited {waited:.0f} s for {what} at {self.where} (trainer.start_timeout={self.timeout:g}). Start "
                "./train.sh on every machine with the same MASTER_ADDR, MASTER_PORT and NNODES and its NODE_RANK, and "
                "let no firewall stand between them"
            )
        if time.monotonic() >= self.next_message:
            print(f"waiting for {what} at {self.where}", file=sys.stderr, flush=True)
            self.next_message = time.monotonic() + REMINDER_S
        time.sleep(POLL_S)
