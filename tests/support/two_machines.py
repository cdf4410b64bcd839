"""Two machines on one: network namespaces with a cable between them, hostnames and /etc/hosts of their own.

with two_machines() as (first, second):
    runs = [first.start(...), second.start(...)]
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.runs import ROOT

_numbers = itertools.count()
NOISE = ("frame #", "socket.cpp", "omitting python", "UserWarning")  # of torch, when connections break


class Run:
    """A launcher on a machine; `lines` are its output, each with the seconds since the start."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.began = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.ended_after: float | None = None
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if not any(sign in line for sign in NOISE):
                self.lines.append((time.monotonic() - self.began, line.rstrip()))
        self.process.wait()
        self.ended_after = time.monotonic() - self.began

    @property
    def output(self) -> str:
        """What was printed up to now."""
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, text: str, seconds: float = 240.0) -> float:
        """Wait until `text` has been printed; returns when that was, in seconds since the start."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for moment, line in list(self.lines):
                if text in line:
                    return moment
            if not self._reader.is_alive():
                break
            time.sleep(0.1)
        raise AssertionError(f"{text!r} was not printed:\n{self.output}")

    def end(self, seconds: float = 240.0) -> int:
        """Wait for the end; returns the exit code."""
        self._reader.join(seconds)
        assert not self._reader.is_alive(), f"still running after {seconds:.0f} s:\n{self.output}"
        return self.process.returncode

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks."""
        return [child for child in psutil.Process(self.process.pid).children() if "python" in child.name()]

    def kill(self) -> None:
        """Kill the launcher and what it has started."""
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in [launcher, *launcher.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)


@dataclass
class Machine:
    """A network namespace with one cable."""

    namespace: str
    hostname: str
    interface: str
    address: str
    runs: list[Run] = field(default_factory=list)

    def start(self, arguments: list[str], module: str = "sft_recipe.cli.train", **environment: str) -> Run:
        """Start the launcher, or another module of Python, with arguments."""
        return self.run([sys.executable, "-m", module, *arguments], **environment)

    def run(self, command: list[str], **environment: str) -> Run:
        """Start a program."""
        variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        run = Run(
            ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "bash", "-c"]
            + [f'hostname {self.hostname}; exec "$@"', "_", *command],
            {**os.environ, **variables, **environment},
        )
        self.runs.append(run)
        return run

    def set_hosts(self, *entries: str) -> None:
        """Replace /etc/hosts of programs that start from now on."""
        folder = Path("/etc/netns") / self.namespace
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *entries, ""]))

    def set_cable(self, state: str) -> None:
        """Set the cable `up` or `down`."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


def why_not() -> str | None:
    """Return why two machines cannot be built here, or None."""
    if not shutil.which("ip"):
        return "needs the program ip (Debian: iproute2)"
    name = f"sft{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "needs the right to create network namespaces (root)"
    _ip("netns", "delete", name)
    return None


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Build both for the duration of the context, and end what runs on them."""
    number = (os.getpid() * 8 + next(_numbers) % 8) % 100000
    net = f"10.{79 + number % 100}.{number // 100 % 250}"
    machines = [
        Machine(f"sft{number}{name}", f"node{name}", f"sft{number}{name}", f"{net}.{host}")
        for host, name in ((1, "a"), (2, "b"))
    ]
    try:
        for machine in machines:
            _ip("netns", "add", machine.namespace)
        first, second = machines
        _ip("link", "add", first.interface, "netns", first.namespace, "type", "veth",
            "peer", "name", second.interface, "netns", second.namespace)  # fmt: skip
        for machine in machines:
            _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", machine.interface)
            _ip("-n", machine.namespace, "link", "set", "lo", "up")
            machine.set_cable("up")
            machine.set_hosts()
        yield first, second
    finally:
        for machine in machines:
            for run in machine.runs:
                run.kill()
            subprocess.run(["ip", "netns", "delete", machine.namespace], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / machine.namespace, ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
