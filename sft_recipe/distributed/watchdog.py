"""The watchdog: a rank that dies, fails or hangs ends all ranks of the run, soon and with the reason."""

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from sft_recipe.distributed.machines import record_attempt
from sft_recipe.distributed.network import own_addresses
from sft_recipe.distributed.rendezvous import attempt, is_error_reporter
from sft_recipe.errors import RecipeError, first_line, is_debugging

HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_TIMEOUT_S = 40.0  # since the last heartbeat of a rank, until it counts as dead
STARTUP_TIMEOUT_S = 300.0  # until the first heartbeat of a rank: its machine may import slowly
COLLECTIVE_TIMEOUT = timedelta(hours=10)  # the watchdog ends a run long before
FAILURE_KEY = "failure"  # of what ended the run, in the store
PEER_LOST = (  # in the errors of gloo, of a store, of NCCL
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "pair closure",
    "Socket Timeout", "Connection was likely closed", "ncclRemoteError", "communicator was aborted",
)  # fmt: skip
EXIT_PEER_LOST = 1  # exit code of a rank that aborts because of another one

_chosen_port = 0  # of the store that this process serves, if it asked for any free port


class Watchdog:
    """A thread of this rank that publishes its state (a heartbeat) and reads the states of other ranks.

    Rank 0 reads those of all ranks, the others that of rank 0, through a store that exists before the process group.
    The first rank that notices a failure writes it to the store; every rank then prints it and exits. Each duration is
    measured with the monotonic clock of one machine.
    """

    def __init__(self, rank: int, world_size: int, heartbeat_timeout: float | None):
        self.rank = rank
        self.world_size = world_size
        self.heartbeat_timeout = heartbeat_timeout
        self._progress = 0
        self._phase = "starting"
        self._since = time.monotonic()
        self._is_limited = False
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self._silent = 0  # intervals since a heartbeat was last completed
        self._own_failure: str | None = None
        # On one machine all ranks have the same.
        self._addresses = own_addresses() if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else []
        self._store = open_store("watchdog")
        self._peers = {other: _PeerState() for other in ([0] if rank else range(1, world_size)) if other != rank}
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        if world_size > 1:
            threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True).start()

    def set_phase(self, phase: str, limited: bool = True) -> None:
        """Record that the main thread begins `phase`, which may last `heartbeat_timeout` seconds if limited."""
        self._progress += 1
        self._phase, self._since, self._is_limited = phase, time.monotonic(), limited

    def heartbeat(self) -> None:
        """Record progress of the main thread within its phase, which restarts its time limit."""
        self.set_phase(self._phase, self._is_limited)

    @contextmanager
    def propagate_failures(self) -> Iterator[None]:
        """End all ranks when this one fails within the context; the failed collectives of others are not reported."""
        try:
            yield
        except RecipeError as error:
            self._publish_failure(str(error), error.exit_code)
            raise
        except Exception as error:
            if self.world_size > 1 and _is_lost_connection(error) and not is_debugging():
                self._exit_after_peer(error)
            self._publish_failure(f"{type(error).__name__}: {first_line(error)}", EXIT_PEER_LOST)
            raise
        finally:
            self._stopped.set()  # nothing is published any more
            self._ended.set()

    def _publish_failure(self, reason: str, code: int) -> None:
        """This rank exits by itself after that, and prints the reason for the ranks of its machine."""
        self._stopped.set()
        self._own_failure = reason
        with suppress(RuntimeError):  # the store may be gone
            self._record_failure(
                f"rank {self.rank} on {socket.gethostname()} stopped: {reason}", code, reporter=_machine()
            )

    def _exit_after_peer(self, error: Exception) -> NoReturn:
        """Exits with the reason of the rank that ended the run, where it published one."""
        self._stopped.set()
        with suppress(RuntimeError):
            if failure := self._read(FAILURE_KEY):
                self._exit_as_told(failure)
        where = f"rank {self.rank} on {socket.gethostname()}"
        _abort(f"{where} aborts: {self._lost_peer(str(error))} exited ({_reason(error)})", EXIT_PEER_LOST)

    def _lost_peer(self, text: str) -> str:
        """Return the rank or the machine at the address that an error of gloo names."""
        address = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", text)
        states: dict[int, dict[str, Any]] = {}
        with suppress(RuntimeError):
            states = {other: self._read(str(other)) for other in range(self.world_size) if other != self.rank}
        there = {
            other: state["host"]
            for other, state in states.items()
            if state and address and address[1].removeprefix("::ffff:") in state["addresses"]
        }
        if not there:
            return "a peer rank"
        ranks, host = list(there), next(iter(there.values()))
        return (
            f"rank {ranks[0]} on {host}" if len(ranks) == 1 else f"a rank on {host} (one of {ranks[0]} to {ranks[-1]})"
        )

    def _run(self) -> None:
        """The first heartbeat comes at once: a rank without one counts as starting up."""
        while not self._stopped.is_set():
            try:
                self._exchange_heartbeats()
            except RuntimeError as error:  # the store is gone, and with it the machine of rank 0
                if not self._stopped.wait(HEARTBEAT_INTERVAL_S):
                    _abort(f"the machine of rank 0 cannot be reached ({first_line(error)})", EXIT_PEER_LOST)
            self._silent = 0
            self._stopped.wait(HEARTBEAT_INTERVAL_S)

    def _watch_store(self) -> None:
        """Without a route to machine 0 a call of the store does not return.

        Intervals are counted, which do not pass in a stopped process.
        """
        while not self._ended.wait(HEARTBEAT_INTERVAL_S):
            self._silent += 1
            if self._silent * HEARTBEAT_INTERVAL_S > HEARTBEAT_TIMEOUT_S:
                seconds = self._silent * HEARTBEAT_INTERVAL_S
                lost = f"the machine of rank 0 ({os.environ['MASTER_ADDR']}) has not answered for {seconds:.0f} s"
                _abort(
                    self._own_failure or f"rank {self.rank} on {socket.gethostname()} aborts: {lost}", EXIT_PEER_LOST
                )

    def _exchange_heartbeats(self) -> None:
        own = self._state()
        self._store.set(str(self.rank), json.dumps(own))
        if (failure := self._read(FAILURE_KEY)) and not self._stopped.is_set():  # set: the failure is its own
            self._exit_as_told(failure)
        states = {self.rank: own}
        for other, peer in self._peers.items():
            if state := self._read(str(other)):
                peer.update(state)
                states[other] = peer.state
            if peer.seconds_silent() > (HEARTBEAT_TIMEOUT_S if peer.state else STARTUP_TIMEOUT_S):
                where = f" on {peer.state['host']}, last {peer.state['phase']}," if peer.state else ""
                self._record_failure(
                    f"rank {other}{where} has sent no heartbeat for {peer.seconds_silent():.0f} s", EXIT_PEER_LOST
                )
        if self.rank == 0:
            self._check_progress(states)

    def _check_progress(self, states: dict[int, dict[str, Any]]) -> None:
        """The ranks with the least progress are the hanging ones; the others wait for them."""
        limit = self.heartbeat_timeout
        if limit is None or all(state["seconds"] < limit for state in states.values()):
            return
        least = min(state["progress"] for state in states.values())
        behind = [rank for rank, state in states.items() if state["progress"] == least]
        state, more = states[behind[0]], f" (and {len(behind) - 1} more)" if len(behind) > 1 else ""
        elsewhere = sorted({other["phase"] for rank, other in states.items() if rank not in behind})
        meanwhile = f", while others are at {elsewhere[0]}" if elsewhere else ""
        reason = f"rank {behind[0]} on {state['host']}{more} hangs: {state['phase']} for {state['seconds']:.0f} s"
        self._record_failure(
            f"{reason}{meanwhile}; trainer.heartbeat_timeout={limit:g}", EXIT_PEER_LOST, hanging=behind
        )

    def _record_failure(self, reason: str, code: int, hanging: Sequence[int] = (), reporter: str | None = None) -> None:
        """The first failure that is written counts."""
        failure = {"reason": reason, "code": code, "hanging": hanging, "reporter": reporter}
        self._store.compare_set(FAILURE_KEY, "", json.dumps(failure))

    def _exit_as_told(self, failure: dict[str, Any]) -> NoReturn:
        if self.rank in failure["hanging"]:
            faulthandler.dump_traceback(all_threads=True)
        if failure["reporter"] == _machine():
            os._exit(failure["code"])
        _abort(failure["reason"], failure["code"])

    def _state(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._since if self._is_limited else 0.0
        return {
            "host": socket.gethostname(),
            "addresses": self._addresses,
            "time": time.monotonic(),
            "progress": self._progress,
            "phase": self._phase,
            "seconds": seconds,
        }

    def _read(self, key: str) -> dict[str, Any]:
        return json.loads(self._store.get(key)) if self._store.check([key]) else {}


class _PeerState:
    """The last state of another rank, and when it arrived here."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.arrived = time.monotonic()

    def update(self, state: dict[str, Any]) -> None:
        if state != self.state:
            self.state, self.arrived = state, time.monotonic()

    def seconds_silent(self) -> float:
        return time.monotonic() - self.arrived


def open_store(purpose: str) -> Store:
    """Return a new connection to torchrun's store, or to one of rank 0 where torchrun has none.

    Its keys belong to this attempt only: a store outlives the ranks that torchrun restarts. Raises RuntimeError.
    """
    global _chosen_port
    port = int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_served = port != 0 and port == _chosen_port  # torch itself may have forgotten that, and would bind it again
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        is_master=os.environ["RANK"] == "0" and not is_torchruns and not is_served,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=STARTUP_TIMEOUT_S),
    )
    if port == 0:  # a single process
        _chosen_port = store.port
        os.environ["MASTER_PORT"] = str(store.port)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        record_attempt(store)
    return PrefixStore(f"sft_recipe/{attempt()}/{purpose}", store)


def _abort(reason: str, code: int) -> NoReturn:
    if is_error_reporter():
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def _reason(error: Exception) -> str:
    """Return the first line of an error without the source file that gloo puts before it."""
    return re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).partition(". This is typically")[0]


def _machine() -> str:
    """Identifies the ranks that one torchrun started."""
    return f"{socket.gethostname()} {os.getppid()}"


def _is_lost_connection(error: Exception) -> bool:
    """Returns whether a collective failed because the process of another rank has ended.

    NCCL, gloo (whose errors name their source file) and stores report other failures as well: a duplicate GPU, a lack
    of memory. Those, and errors of other libraries, are this rank's own.
    """
    text = str(error)
    is_collective = isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return is_collective and any(sign in text for sign in PEER_LOST)
