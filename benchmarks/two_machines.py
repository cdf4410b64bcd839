"""What happens when two machines do not find each other or lose each other: python -m benchmarks.two_machines

Two network namespaces of this machine play the machines; they need root. Writes the table of docs/distributed.md.
tests/launch/test_two_machines.py runs the same scenarios and checks codes and messages.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import table
from tests.support import tiny
from tests.support.small_run import arguments
from tests.support.two_machines import Machine, Run, two_machines, why_not

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
BEGIN, END = "<!-- two machines: begin -->\n", "<!-- two machines: end -->\n"
LONG = "trainer.total_epochs=400"  # longer than any scenario


@dataclass(frozen=True)
class Pair:
    """Two machines and the arguments of their run; `folder` is shared by both."""

    first: Machine
    second: Machine
    model: Path
    folder: Path

    def arguments(self, node: int, *extra: str, master_addr: str | None = None) -> list[str]:
        """Return the command line of machine `node`."""
        master = ["--nnodes=2", f"--node_rank={node}", f"--master_addr={master_addr or self.first.address}"]
        return [*master, *arguments(self.model, self.folder, *extra)]

    def start(self, *extra: str, **environment: str) -> tuple[Run, Run]:
        """Start the same run on both."""
        return self.first.start(self.arguments(0, *extra), **environment), self.second.start(
            self.arguments(1, *extra), **environment
        )


@dataclass(frozen=True)
class Result:
    """How both launchers ended: exit codes, seconds after the cause, and what they printed."""

    codes: tuple[int, int]
    seconds: tuple[float, float]
    output: tuple[str, str]


@dataclass(frozen=True)
class Scenario:
    """One thing that goes wrong.

    `run` starts both and returns them with the moment of the cause. Both end with one of `codes` within `limit`
    seconds, and each prints its message.
    """

    what: str
    run: Callable[[Pair], tuple[Run, Run, float]]
    codes: tuple[int, ...]
    messages: tuple[str, str]
    limit: float = 60.0


def play(scenario: Scenario, model: Path, folder: Path) -> Result:
    """Play a scenario on new machines."""
    with two_machines() as (first, second):
        *runs, cause = scenario.run(Pair(first, second, model, folder))
        codes = runs[0].end(), runs[1].end()
        seconds = tuple(max(0.0, run.began + run.ended_after - cause) for run in runs)
        return Result(codes, seconds, (runs[0].output, runs[1].output))


def _started(pair: Pair, *extra: str) -> tuple[Run, Run]:
    """Start a long run and wait for its fifth step."""
    runs = pair.start(LONG, *extra)
    runs[0].wait_for("step 5/")
    return runs


def _mid_run(cause: Callable[[Pair, Run, Run], None]) -> Callable[[Pair], tuple[Run, Run, float]]:
    def run(pair: Pair) -> tuple[Run, Run, float]:
        first, second = _started(pair)
        moment = time.monotonic()
        cause(pair, first, second)
        return first, second, moment

    return run


def _at_start(
    first: tuple[str, ...] = (), second: tuple[str, ...] = (), **environment: str
) -> Callable[[Pair], tuple[Run, Run, float]]:
    """Start both with different further arguments; `environment` is that of machine 1."""

    def run(pair: Pair) -> tuple[Run, Run, float]:
        runs = pair.first.start(pair.arguments(0, *first)), pair.second.start(pair.arguments(1, *second), **environment)
        return *runs, time.monotonic()

    return run


def _late(pair: Pair) -> tuple[Run, Run, float]:
    first = pair.first.start(pair.arguments(0))
    first.wait_for("waiting for 1 of 2 machines")
    time.sleep(60)
    second = pair.second.start(pair.arguments(1))
    return first, second, time.monotonic()


def _same_number(pair: Pair) -> tuple[Run, Run, float]:
    first = pair.first.start(pair.arguments(0))
    first.wait_for("waiting for 1 of 2 machines")
    second = pair.second.start(pair.arguments(0))
    return first, second, time.monotonic()


def _other_data(pair: Pair) -> tuple[Run, Run, float]:
    other = pair.folder / "other.json"
    first = pair.first.start(pair.arguments(0))
    other.write_text((pair.folder / "train.json").read_text().replace("What", "Which"))
    second = pair.second.start(pair.arguments(1, f"data.train_files={other}"))
    return first, second, time.monotonic()


def _loopback_name(pair: Pair) -> tuple[Run, Run, float]:
    """As on Debian: each machine's /etc/hosts gives its hostname a loopback address."""
    for machine, other in ((pair.first, pair.second), (pair.second, pair.first)):
        machine.set_hosts(f"127.0.1.1 {machine.hostname}", f"{other.address} {other.hostname}")
    name = pair.first.hostname
    runs = [
        pair.first.start(pair.arguments(0, master_addr=name)),
        pair.second.start(pair.arguments(1, master_addr=name)),
    ]
    return *runs, time.monotonic()


def _unknown_name(pair: Pair) -> tuple[Run, Run, float]:
    pair.first.set_hosts(f"{pair.first.address} nodea")
    extra = "trainer.start_timeout=10"
    first = pair.first.start(pair.arguments(0, extra, master_addr="nodea"))
    return first, pair.second.start(pair.arguments(1, extra, master_addr="nodea")), time.monotonic()


def _kill_rank(pair: Pair, first: Run, second: Run) -> None:
    for rank in second.ranks():
        rank.kill()


def _cable_out_20_s(pair: Pair) -> tuple[Run, Run, float]:
    runs = pair.start("trainer.total_epochs=60")
    runs[0].wait_for("step 5/")
    pair.second.set_cable("down")
    time.sleep(20)
    pair.second.set_cable("up")
    return *runs, time.monotonic()


SCENARIOS = {
    "plain": Scenario("nothing", lambda pair: (*pair.start(), time.monotonic()), (0,), ("step 10/10", "")),
    "late": Scenario("machine 1 starts 60 s late", _late, (0,), ("waiting for 1 of 2 machines (NODE_RANK=1)", "")),
    "other_data": Scenario("other data on machine 1", _other_data, (2,), ("data", "different settings")),
    "other_settings": Scenario(
        "another learning rate on machine 1",
        _at_start(second=("optim.lr=1e-3",)), (2,), ("different settings", "different settings"),
    ),
    "other_ranks": Scenario(
        "two ranks on machine 1, one on machine 0",
        _at_start(second=("trainer.n_gpus_per_node=2",)), (2,), ("N_GPUS is", "N_GPUS is"),
    ),
    "same_number": Scenario(
        "both have NODE_RANK=0", _same_number, (2,), ("two machines have NODE_RANK=0", "two machines have NODE_RANK=0"),
    ),
    "other_port": Scenario(
        "another MASTER_PORT on machine 1",
        _at_start(("trainer.start_timeout=10",), ("trainer.start_timeout=10", "trainer.master_port=29511")),
        (2,), ("for 1 of 2 machines (NODE_RANK=1)", "for machine 0 at"),
    ),
    "not_shared": Scenario(
        "an OUTPUT_DIR that is not shared",
        lambda pair: _at_start(second=(f"trainer.output_dir={pair.folder}/elsewhere",))(pair),
        (2,), ("is not the same folder on all machines", "is not the same folder on all machines"),
    ),
    "loopback_name": Scenario("hostnames are 127.0.1.1 (Debian)", _loopback_name, (0,), ("step 10/10", "")),
    "unknown_name": Scenario(
        "machine 1 cannot resolve MASTER_ADDR",
        _unknown_name, (2,), ("for 1 of 2 machines", "cannot be resolved on nodeb"),
    ),
    "no_interface": Scenario(
        "GLOO_SOCKET_IFNAME is wrong on machine 1",
        _at_start(GLOO_SOCKET_IFNAME="eth9"), (2,), ("this machine has no interface eth9",) * 2,
    ),
    "loopback_interface": Scenario(
        "GLOO_SOCKET_IFNAME=lo on machine 1",
        _at_start(GLOO_SOCKET_IFNAME="lo"), (2,), ("GLOO_SOCKET_IFNAME=lo does not reach",) * 2,
    ),
    "bad_path": Scenario(
        "data that machine 1 does not have",
        _at_start(second=("data.train_files=/nowhere.json",)), (2,), ("/nowhere.json", "/nowhere.json"),
    ),
    "rank_killed": Scenario(
        "a rank of machine 1 is killed",
        _mid_run(_kill_rank), (1, 137), ("aborts: rank 1 on nodeb exited", "was killed by SIGKILL"),
    ),
    "launcher_killed": Scenario(
        "the launcher of machine 1 is killed",
        _mid_run(lambda pair, first, second: second.process.kill()), (1, -9), ("aborts: rank 1 on nodeb exited", ""),
    ),
    "first_launcher_killed": Scenario(
        "the launcher of machine 0 is killed",
        _mid_run(lambda pair, first, second: first.process.kill()), (1, -9), ("", "aborts: "),
    ),
    "stopped": Scenario(
        "SIGTERM on machine 1",
        _mid_run(lambda pair, first, second: second.process.send_signal(signal.SIGTERM)),
        (75,), ("Stopped at step", ""),
    ),
    "cable_20_s": Scenario("the cable is out for 20 s", _cable_out_20_s, (0,), ("step 300/300", "")),
    "cable": Scenario(
        "the cable is out for good",
        _mid_run(lambda pair, first, second: pair.second.set_cable("down")),
        (1,), ("has sent no heartbeat for", "has not answered for"),
    ),
}  # fmt: skip


def main() -> int:
    """Play all scenarios and write the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SCENARIOS, help="one scenario, with what both machines print; writes no page")
    options = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny.build_model(Path(scratch) / "model")
        for name, scenario in SCENARIOS.items():
            if options.only in (None, name):
                result = play(scenario, model, Path(scratch) / name)
                print(f"{name}: exit codes {result.codes}, after {result.seconds[0]:.0f} and {result.seconds[1]:.0f} s")
                if options.only:
                    print(result.output[0], result.output[1], sep="\n--- machine 1\n")
                rows.append(_row(scenario, result))
    if not options.only:
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        head = ["what happens", "machine 0", "machine 1", "last message of machine 0", "last message of machine 1"]
        PAGE.write_text(f"{before}{BEGIN}{table(head, rows)}\n{END}{rest.split(END)[1]}")
    return 0


def _row(scenario: Scenario, result: Result) -> list[str]:
    ends = [f"{code} after {seconds:.0f} s" for code, seconds in zip(result.codes, result.seconds, strict=True)]
    return [scenario.what, *ends, *(_last_message(output) for output in result.output)]


def _last_message(output: str) -> str:
    errors = [line for line in output.splitlines() if line.startswith(("error", "stopped", "  - "))]
    return " ".join(errors)[:200].replace("|", " ")


if __name__ == "__main__":
    sys.exit(main())
