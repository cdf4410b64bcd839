"""Ranks watch each other: one that dies, fails or hangs ends all, soon and with the reason."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import PrefixStore, Store, TCPStore

from sft_recipe.distributed.rendezvous import is_error_reporter
from sft_recipe.errors import RecipeError, is_debugging

HEARTBEAT_INTERVAL_S = 2.0  # seconds between a rank's signs of life
HEARTBEAT_TIMEOUT_S = 40.0  # seconds after which a rank that was heard of counts as dead
STARTUP_TIMEOUT_S = 300.0  # seconds that a rank may take to be heard of at all: its machine may import slowly
COLLECTIVE_TIMEOUT = timedelta(hours=10)  # a watched run ends long before
FAILURE_KEY = "end"  # the key of what ended the run
EXIT_PEER_LOST = 1  # exit code of a rank that stops because of another one


class Watchdog:
    """This rank's part: a thread that tells where it is, and reads what became of the others.

    Rank 0 listens to all, all listen to rank 0, through a store that exists before the process group does. Whoever
    finds something wrong writes it there as the run's end; every rank prints it and leaves. All durations are measured
    on one machine's monotonic clock.
    """

    def __init__(self, rank: int, world_size: int, heartbeat_timeout: float | None):
        self.rank = rank
        self.world_size = world_size
        self.heartbeat_timeout = heartbeat_timeout
        self._progress = 0
        self._phase = "starting"
        self._since = time.monotonic()
        self._is_limited = False
        self._over = threading.Event()
        self._store = open_store("watch")
        self._peers = {other: _PeerState() for other in ([0] if rank else range(1, world_size)) if other != rank}
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def set_phase(self, phase: str, limited: bool = True) -> None:
        """The main thread has come to `phase`; a limited one may last `heartbeat_timeout` seconds."""
        self._progress += 1
        self._phase, self._since, self._is_limited = phase, time.monotonic(), limited

    def heartbeat(self) -> None:
        """The main thread goes on within its phase: a long step is no hanging one."""
        self.set_phase(self._phase, self._is_limited)

    @contextmanager
    def propagate_failures(self) -> Iterator[None]:
        """What fails in this context on one rank ends all; a collective that fails because of that is not told."""
        try:
            yield
        except RecipeError as error:
            self._publish_failure(str(error), error.exit_code)
            raise
        except Exception as error:
            if self.world_size > 1 and _is_lost_connection(error) and not is_debugging():
                self._exit_after_peer(error)
            self._publish_failure(f"{type(error).__name__}: {_first_line(error)}", EXIT_PEER_LOST)
            raise
        finally:
            self._over.set()  # from here on silence means nothing

    def _publish_failure(self, reason: str, code: int) -> None:
        """Last words of this rank, which leaves by itself; those on this machine hear the reason from it."""
        self._over.set()
        with suppress(RuntimeError):  # nobody is left to hear it
            self._record_failure(
                f"rank {self.rank} on {socket.gethostname()} stopped: {reason}", code, reporter=_machine()
            )

    def _exit_after_peer(self, error: Exception) -> NoReturn:
        """Leave with the reason of the rank that ended the run, where it left one."""
        self._over.set()
        with suppress(RuntimeError):
            if end := self._read(FAILURE_KEY):
                self._exit_as_told(end)
        _abort(f"rank {self.rank} stops, since another rank died without a word ({_first_line(error)})", EXIT_PEER_LOST)

    def _run(self) -> None:
        """The first sign of life comes at once: who was never heard of is given minutes to start."""
        while not self._over.is_set():
            try:
                self._exchange_heartbeats()
            except RuntimeError as error:  # the store is gone, and with it the machine that held it
                if not self._over.wait(HEARTBEAT_INTERVAL_S):
                    _abort(f"the machine of rank 0 cannot be reached any more ({_first_line(error)})", EXIT_PEER_LOST)
            self._over.wait(HEARTBEAT_INTERVAL_S)

    def _exchange_heartbeats(self) -> None:
        ours = self._state()
        self._store.set(str(self.rank), json.dumps(ours))
        if (end := self._read(FAILURE_KEY)) and not self._over.is_set():  # its own last words are no order to leave
            self._exit_as_told(end)
        states = {self.rank: ours}
        for other, peer in self._peers.items():
            if state := self._read(str(other)):
                peer.take(state)
                states[other] = peer.state
            if peer.seconds_silent() > (HEARTBEAT_TIMEOUT_S if peer.state else STARTUP_TIMEOUT_S):
                where = f" on {peer.state['host']}, last {peer.state['phase']}," if peer.state else ""
                self._record_failure(
                    f"rank {other}{where} has not been heard of for {peer.seconds_silent():.0f} s", EXIT_PEER_LOST
                )
        if self.rank == 0:
            self._check_progress(states)

    def _check_progress(self, states: dict[int, dict[str, Any]]) -> None:
        """The ranks that have come least far are those that the others wait for."""
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
        """The first end that is written is the run's."""
        end = {"reason": reason, "code": code, "hanging": hanging, "teller": reporter}
        self._store.compare_set(FAILURE_KEY, "", json.dumps(end))

    def _exit_as_told(self, end: dict[str, Any]) -> NoReturn:
        if self.rank in end["hanging"]:
            faulthandler.dump_traceback(all_threads=True)
        if end["teller"] == _machine():
            os._exit(end["code"])
        _abort(end["reason"], end["code"])

    def _state(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._since if self._is_limited else 0.0
        return {
            "host": socket.gethostname(),
            "beat": time.monotonic(),
            "progress": self._progress,
            "phase": self._phase,
            "seconds": seconds,
        }

    def _read(self, key: str) -> dict[str, Any]:
        return json.loads(self._store.get(key)) if self._store.check([key]) else {}


class _PeerState:
    """What another rank said last, and when that came here."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.when = time.monotonic()

    def take(self, state: dict[str, Any]) -> None:
        if state != self.state:
            self.state, self.when = state, time.monotonic()

    def seconds_silent(self) -> float:
        return time.monotonic() - self.when


def open_store(purpose: str) -> Store:
    """A connection of its own to torchrun's store, or to that of rank 0 where it has none.

    Keys are this attempt's: the store of a run that torchrun restarts remembers the ranks that died.
    """
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not is_torchruns,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=STARTUP_TIMEOUT_S),
    )
    os.environ["MASTER_PORT"] = str(store.port)  # a single process asks for port 0 and gets a free one
    return PrefixStore(f"sft_recipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{purpose}", store)


def _abort(reason: str, code: int) -> NoReturn:
    if is_error_reporter():
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def _machine() -> str:
    """Of ranks that one torchrun started."""
    return f"{socket.gethostname()} {os.getppid()}"


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed since another rank's process has ended."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "NCCL", "Socket Timeout")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
