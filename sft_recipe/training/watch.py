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

from sft_recipe.errors import RecipeError, is_debugging
from sft_recipe.training.meeting import speaks_for_machine

BEAT = 2.0  # seconds between a rank's signs of life
SILENCE = 40.0  # seconds after which a rank that was heard of counts as dead
FIRST_SILENCE = 300.0  # seconds that a rank may take to be heard of at all: its machine may import slowly
COLLECTIVE_TIMEOUT = timedelta(hours=10)  # a watched run ends long before
END = "end"  # the key of what ended the run
LOST = 1  # exit code of a rank that stops because of another one


class Watch:
    """This rank's part: a thread that tells where it is, and reads what became of the others.

    Rank 0 listens to all, all listen to rank 0, through a store that exists before the process group does. Whoever
    finds something wrong writes it there as the run's end; every rank prints it and leaves. All durations are measured
    on one machine's monotonic clock.
    """

    def __init__(self, rank: int, world_size: int, hang_timeout: float | None):
        self.rank = rank
        self.world_size = world_size
        self.hang_timeout = hang_timeout
        self._progress = 0
        self._phase = "starting"
        self._since = time.monotonic()
        self._is_limited = False
        self._over = threading.Event()
        self._store = open_store("watch")
        self._heard = {other: _Heard() for other in ([0] if rank else range(1, world_size)) if other != rank}
        threading.Thread(target=self._live, name="watch", daemon=True).start()

    def at(self, phase: str, limited: bool = True) -> None:
        """The main thread has come to `phase`; a limited one that lasts longer than `hang_timeout` seconds hangs."""
        self._progress += 1
        self._phase, self._since, self._is_limited = phase, time.monotonic(), limited

    def go_on(self) -> None:
        """The main thread goes on within its phase: a long step is no hanging one."""
        self.at(self._phase, self._is_limited)

    @contextmanager
    def ending_all(self) -> Iterator[None]:
        """What fails in this context on one rank ends all; a collective that fails because of that is not told."""
        try:
            yield
        except RecipeError as error:
            self._tell(str(error), error.exit_code)
            raise
        except Exception as error:
            if self.world_size > 1 and _is_lost_connection(error) and not is_debugging():
                self._follow(error)
            self._tell(f"{type(error).__name__}: {_first_line(error)}", LOST)
            raise
        finally:
            self._over.set()  # from here on silence means nothing

    def _tell(self, reason: str, code: int) -> None:
        """Last words of this rank, which leaves by itself; those on this machine hear the reason from it."""
        self._over.set()
        with suppress(RuntimeError):  # nobody is left to hear it
            self._end(f"rank {self.rank} on {socket.gethostname()} stopped: {reason}", code, teller=_machine())

    def _follow(self, error: Exception) -> NoReturn:
        """Leave with the reason of the rank that ended the run, where it left one."""
        self._over.set()
        with suppress(RuntimeError):
            if end := self._read(END):
                self._obey(end)
        _leave(f"rank {self.rank} stops, since another rank died without a word ({_first_line(error)})", LOST)

    def _live(self) -> None:
        """The first sign of life comes at once: who was never heard of is given minutes to start."""
        while not self._over.is_set():
            try:
                self._beat()
            except RuntimeError as error:  # the store is gone, and with it the machine that held it
                if not self._over.wait(BEAT):
                    _leave(f"the machine of rank 0 cannot be reached any more ({_first_line(error)})", LOST)
            self._over.wait(BEAT)

    def _beat(self) -> None:
        ours = self._state()
        self._store.set(str(self.rank), json.dumps(ours))
        if (end := self._read(END)) and not self._over.is_set():  # its own last words are no order to leave
            self._obey(end)
        states = {self.rank: ours}
        for other, heard in self._heard.items():
            if state := self._read(str(other)):
                heard.take(state)
                states[other] = heard.state
            if heard.silence() > (SILENCE if heard.state else FIRST_SILENCE):
                where = f" on {heard.state['host']}, last {heard.state['phase']}," if heard.state else ""
                self._end(f"rank {other}{where} has not been heard of for {heard.silence():.0f} s", LOST)
        if self.rank == 0:
            self._judge_progress(states)

    def _judge_progress(self, states: dict[int, dict[str, Any]]) -> None:
        """The ranks that have come least far are those that the others wait for."""
        limit = self.hang_timeout
        if limit is None or all(state["seconds"] < limit for state in states.values()):
            return
        least = min(state["progress"] for state in states.values())
        behind = [rank for rank, state in states.items() if state["progress"] == least]
        state, more = states[behind[0]], f" (and {len(behind) - 1} more)" if len(behind) > 1 else ""
        elsewhere = sorted({other["phase"] for rank, other in states.items() if rank not in behind})
        meanwhile = f", while others are at {elsewhere[0]}" if elsewhere else ""
        reason = f"rank {behind[0]} on {state['host']}{more} hangs: {state['phase']} for {state['seconds']:.0f} s"
        self._end(f"{reason}{meanwhile}; trainer.hang_timeout={limit:g}", LOST, hanging=behind)

    def _end(self, reason: str, code: int, hanging: Sequence[int] = (), teller: str | None = None) -> None:
        """The first end that is written is the run's."""
        end = {"reason": reason, "code": code, "hanging": hanging, "teller": teller}
        self._store.compare_set(END, "", json.dumps(end))

    def _obey(self, end: dict[str, Any]) -> NoReturn:
        if self.rank in end["hanging"]:
            faulthandler.dump_traceback(all_threads=True)
        if end["teller"] == _machine():
            os._exit(end["code"])
        _leave(end["reason"], end["code"])

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


class _Heard:
    """What another rank said last, and when that came here."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.when = time.monotonic()

    def take(self, state: dict[str, Any]) -> None:
        if state != self.state:
            self.state, self.when = state, time.monotonic()

    def silence(self) -> float:
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
        timeout=timedelta(seconds=FIRST_SILENCE),
    )
    return PrefixStore(f"sft_recipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{purpose}", store)


def _leave(reason: str, code: int) -> NoReturn:
    if speaks_for_machine():
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
