"""Runs on a Ray cluster: one actor per machine starts this recipe's launcher there, and this driver watches them.

`./train.sh --launcher ray`, or `python -m sft_recipe.launch.ray trainer.nnodes=2 ...`, which a Ray job can run as well.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sft_recipe.distributed.signals import EXIT_PREEMPTED
from sft_recipe.errors import PreflightError, pip_install, run_command
from sft_recipe.language import plural

if TYPE_CHECKING:
    from sft_recipe.config.schema import Config

RESOURCES_S = 30.0  # until a cluster without the resources is an error; machines may be joining
LOST_S = 90.0  # for the other machines to notice that one was lost
MASTER_UNKNOWN = "trainer.master_addr=chosen-later"  # until the machines of the run are; several need an address
FINAL = (0, 2, EXIT_PREEMPTED)  # exit codes after which a run is not started again


def start_on_cluster(config: Config) -> int:
    """Run on the machines of a Ray cluster; returns the exit code that the run would have without Ray.

    A failed run is started again up to `trainer.auto_restart` times, from its newest checkpoint, on the machines that
    the cluster then has. Raises PreflightError if the cluster lacks the resources.
    """
    with _connected():
        for restart in range(config.trainer.auto_restart + 1):
            group, count = _reserve(config, at_least=1 if restart else config.trainer.nnodes)
            if restart:
                print(f"restart {restart} of {config.trainer.auto_restart} on {plural(count, 'machine')}", flush=True)
            code, is_stopped = _Attempt(config, count, restart).run(group)
            if code in FINAL or is_stopped:
                break
    return code


@contextmanager
def _connected() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS or of this machine; without one, Ray starts one here."""
    try:
        import ray
    except ImportError:
        raise PreflightError(f"--launcher ray needs the package ray: {pip_install('ray')}") from None
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PreflightError(f"the Ray cluster cannot be reached: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _needed(config: Config) -> dict[str, float]:
    """Return the resources of a machine: a GPU for each rank where the cluster has any, else a CPU."""
    import ray

    uses_gpus = config.trainer.device == "cuda" or (
        config.trainer.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    )
    ranks = float(config.trainer.n_gpus_per_node)
    return {"GPU": ranks, "CPU": 1.0} if uses_gpus else {"CPU": ranks}


def _wait_for_nodes(config: Config, at_least: int) -> int:
    """Return how many machines have the resources, once all that the run asks for do or the wait is over."""
    import ray

    end = time.monotonic() + RESOURCES_S
    while True:
        needed = _needed(config)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        fits = sum(all(node["Resources"].get(name, 0) >= needed[name] for name in needed) for node in nodes)
        if fits >= config.trainer.nnodes:
            return fits
        if time.monotonic() > end:
            if fits >= at_least:
                return fits
            raise PreflightError(_lacking(config, needed, nodes))
        time.sleep(1)


def _reserve(config: Config, at_least: int) -> tuple[Any, int]:
    """Reserve the resources, each bundle on another machine; returns the placement group and its number of machines.

    Ray notices after a while that a machine is lost; until then the group does not become ready.
    """
    import ray
    from ray.util.placement_group import placement_group

    count = _wait_for_nodes(config, at_least)
    while True:
        group = placement_group([_needed(config)] * min(count, config.trainer.nnodes), strategy="STRICT_SPREAD")
        try:
            ray.get(group.ready(), timeout=RESOURCES_S)
            return group, min(count, config.trainer.nnodes)
        except ray.exceptions.GetTimeoutError:
            ray.util.remove_placement_group(group)
        before, count = count, _wait_for_nodes(config, at_least)
        if count == before:
            there = [node for node in ray.nodes() if node["Alive"]]
            raise PreflightError(f"{_lacking(config, _needed(config), there)}\nand other jobs use some of them")


def _lacking(config: Config, needed: dict[str, float], nodes: list[dict[str, Any]]) -> str:
    there = [
        f"  - {node['NodeManagerHostname']}: "
        + ", ".join(f"{node['Resources'].get(name, 0):g} {name}s" for name in ("GPU", "CPU"))
        for node in nodes
    ]
    wanted = " and ".join(f"{amount:g} {name}s" for name, amount in needed.items())
    head = f"trainer.nnodes={config.trainer.nnodes} needs as many machines with {wanted} each; the cluster has"
    return "\n".join([head, *there])


class _Attempt:
    """One start of the run: its placement, its actors, and what they report."""

    def __init__(self, config: Config, nnodes: int, restart: int):
        self.config, self.nnodes, self.restart = config, nnodes, restart
        self.reports: queue.Queue[tuple[int, str | int]] = queue.Queue()  # a line, or an exit code at the end
        self.is_stopped = False

    def run(self, group: Any) -> tuple[int, bool]:
        """Run on a placement group; returns the exit code, and whether a signal to this driver ended the run."""
        import ray

        try:
            machines = [self._create(group, index) for index in range(self.nnodes)]
            hosts = ray.get([machine.describe.remote() for machine in machines])
            with self._forwarded_signals(machines):
                for index, machine in enumerate(machines):
                    arguments = self._configuration(index, hosts[0]), self._environment()
                    threading.Thread(
                        target=self._relay, args=(index, hosts[index][0], machine, arguments), daemon=True
                    ).start()
                return self._watch(hosts), self.is_stopped
        finally:
            ray.util.remove_placement_group(group)

    def _create(self, group: Any, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needed = _needed(self.config)
        actor: Any = ray.remote(_machine_class())
        return actor.options(
            max_concurrency=3,
            num_cpus=needed["CPU"],
            num_gpus=needed.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()

    def _configuration(self, index: int, master: tuple[str, str, int]) -> str:
        from sft_recipe.config.compose import to_json

        changes: dict[str, Any] = {"nnodes": self.nnodes, "node_rank": index, "auto_restart": 0}
        if self.nnodes > 1:
            changes |= {"master_addr": master[1], "master_port": master[2]}
        trainer = self.config.trainer.model_copy(update=changes)
        return to_json(self.config.model_copy(update={"trainer": trainer}))

    def _environment(self) -> dict[str, str | None]:
        """Return what the launchers' environment has otherwise than the actors': Ray sets one thread for each."""
        from sft_recipe.distributed.rendezvous import FIRST_ATTEMPT

        return {FIRST_ATTEMPT: str(self.restart), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}

    def _relay(self, index: int, host: str, machine: Any, arguments: tuple[Any, ...]) -> None:
        """Hand on what a machine reports; for a thread."""
        import ray

        code: str | int = 1
        try:
            for reference in machine.launch.options(num_returns="streaming").remote(*arguments):
                code = ray.get(reference)
                if isinstance(code, str):
                    self.reports.put((index, code))
        except ray.exceptions.RayError as error:
            self.reports.put((index, f"error: machine {host} was lost ({str(error).splitlines()[0]})"))
            code = 1
        self.reports.put((index, code if isinstance(code, int) else 1))

    def _watch(self, hosts: list[tuple[str, str, int]]) -> int:
        """Print all lines, each once, and return the exit code; after a loss the others have a while to end."""
        codes: dict[int, int] = {}
        end = None
        while len(codes) < self.nnodes and (end is None or time.monotonic() < end):
            with suppress(queue.Empty):
                index, report = self.reports.get(timeout=0.5)
                if isinstance(report, int):
                    codes[index] = report
                    end = end or (time.monotonic() + LOST_S if report not in FINAL else None)
                else:
                    print(f"[{hosts[index][0]}] {report}" if index else report, flush=True)
        found = list(codes.values())
        return next((code for code in (2, EXIT_PREEMPTED) if code in found), max(found, key=abs))

    @contextmanager
    def _forwarded_signals(self, machines: list[Any]) -> Iterator[None]:
        def forward(number: int, _frame: object) -> None:
            self.is_stopped |= number != signal.SIGUSR1
            for machine in machines:
                machine.send_signal.remote(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _machine_class() -> type:
    """Return the class of the actors; as a local class it is sent to machines whose path has no recipe yet."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

    class Machine:
        """A machine of the run; `launch` yields the lines that its launcher prints, and at the end its exit code."""

        def describe(self) -> tuple[str, str, int]:
            import socket

            import ray

            with socket.socket() as free:
                free.bind(("", 0))
                return socket.gethostname(), ray.util.get_node_ip_address(), free.getsockname()[1]

        def launch(self, configuration: str, changes: dict[str, str | None]) -> Iterator[str | int]:
            import ctypes
            import subprocess

            root = next((path for path in (os.getcwd(), home) if os.path.isdir(f"{path}/sft_recipe/launch")), None)
            if root is None:
                yield f"error: this machine has no {home}: the recipe must have the same path on all of them"
                yield 2
                return
            variables = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
            for name, value in changes.items():
                variables.pop(name, None)
                variables |= {name: value} if value is not None else {}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sft_recipe.launch.local"],
                cwd=root,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),  # ends with this actor
            )
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(configuration)
            self.process.stdin.close()
            for line in self.process.stdout:
                yield line.rstrip("\n")
            code = self.process.wait()
            yield code if code >= 0 else 128 - code

        def send_signal(self, number: int) -> None:
            self.process.send_signal(number)

    return Machine


def places(config: Config) -> int:
    """Return how many such runs the cluster has room for at a time, at least 1."""
    import ray

    with _connected():
        needed = _needed(config)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = [min(int(node.get(name, 0) // amount) for name, amount in needed.items()) for node in nodes]
    return max(1, sum(fits) if config.trainer.nnodes == 1 else sum(map(bool, fits)) // config.trainer.nnodes)


def main(arguments: list[str]) -> int:
    """Run with Hydra overrides, or with - and the JSON of a configuration at standard input; returns the exit code."""

    def start() -> int:
        from sft_recipe.config.compose import from_json, load_config

        if arguments == ["-"]:
            return start_on_cluster(from_json(sys.stdin.read()))
        return start_on_cluster(load_config([MASTER_UNKNOWN, *arguments]))

    return run_command(start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
