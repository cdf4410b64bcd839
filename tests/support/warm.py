"""A process that has imported everything and starts runs by forking: a run costs one second instead of thirty.

with Warm() as warm:
    end = warm.run(["trainer.total_training_steps=2", ...], ranks=2)
    assert end.code == 0, end.output
"""

import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT

EXIT_GRACE_S = 30  # how long other ranks may live after one has failed, as under torchrun
PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


@dataclass(frozen=True)
class RunResult:
    """The exit codes of all ranks (-9 for a killed one), their output, and the time the run took."""

    codes: list[int]
    output: str
    seconds: float
    seconds_to_first_step: float | None

    @property
    def code(self) -> int:
        """Return 0 if all ranks exited with 0, else the first other code."""
        return next((code for code in self.codes if code), 0)


class Warm:
    """The warm process; it lives as long as the context."""

    def __enter__(self) -> "Warm":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(
        self,
        arguments: list[str],
        ranks: int = 1,
        setup: tuple[str, dict[str, Any]] | None = None,
        kill_after: float | None = None,
        timeout: float = 600.0,
        **environment: str,
    ) -> RunResult:
        """Run main_sft on `ranks` ranks.

        `setup` is the name of a function ("module:name") and its arguments; each rank calls it, with `rank` added,
        before it starts. All ranks get SIGKILL after `kill_after` seconds.
        """
        job = dict(arguments=arguments, ranks=ranks, setup=setup, kill_after=kill_after, timeout=timeout)
        self.process.stdin.write(json.dumps({**job, "environment": environment}) + "\n")
        self.process.stdin.flush()
        return RunResult(**json.loads(self.process.stdout.readline()))


def _serve() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    faulthandler.register(signal.SIGUSR1)  # of the ranks as well: they show where they hang
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_everything()
    for line in sys.stdin:
        answers.write(json.dumps(_run(**json.loads(line))) + "\n")
        answers.flush()


def _import_everything() -> None:
    from sft_recipe.engine.cpu.platform import use_cpu

    use_cpu()
    for module in (
        "main_sft",
        "config.preflight",
        "training.trainer",
        "distributed.consistency",
        "checkpoint.run_lock",
        "models.stats",
    ):
        import_module(f"sft_recipe.{module}")
    for module in ("verl.utils.tracking", "peft", "transformers.models.llama.modeling_llama", "torch._dynamo"):
        import_module(module)


def _run(
    arguments: list[str],
    ranks: int,
    setup: Any,
    kill_after: float | None,
    timeout: float,
    environment: dict[str, str],
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        began, limit = time.monotonic(), kill_after or timeout
        group = _fork(lambda: _start_ranks(arguments, ranks, setup, environment, Path(scratch)))
        while os.waitpid(group, os.WNOHANG)[0] == 0:
            if time.monotonic() - began > limit:
                if not kill_after:
                    os.killpg(group, signal.SIGUSR1)
                    time.sleep(1)
                os.killpg(group, signal.SIGKILL)
                limit = float("inf")
            time.sleep(0.01)
        _reap(group)
        texts = {path.name: path.read_text() for path in Path(scratch).iterdir()}
        first = float(texts["first_step"]) - began if "first_step" in texts else None
        return {
            "codes": json.loads(texts["codes"]) if "codes" in texts else [-signal.SIGKILL] * ranks,
            "output": texts.get("output", ""),
            "seconds": time.monotonic() - began,
            "seconds_to_first_step": first,
        }


def _start_ranks(arguments: list[str], ranks: int, setup: Any, environment: dict[str, str], scratch: Path) -> int:
    """Act as torchrun: start the ranks, wait for them, and lead their process group."""
    os.setsid()
    output = os.open(scratch / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    store, port = _start_store()
    os.environ.update(environment, MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    left = {_fork(lambda rank=rank: _rank(arguments, rank, setup, scratch)): rank for rank in range(ranks)}
    codes, stopped = [0] * ranks, []
    while left:
        process, status = os.waitpid(-1, os.WUNTRACED)
        assert process != store, "the process that holds the store has ended"
        if os.WIFSTOPPED(status):
            stopped.append(process)
            continue
        codes[left.pop(process)] = os.waitstatus_to_exitcode(status)
        if any(codes) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
            signal.signal(signal.SIGALRM, lambda *_: [os.kill(rank, signal.SIGKILL) for rank in left])
            signal.alarm(EXIT_GRACE_S)
            for rank in stopped:
                os.kill(rank, signal.SIGKILL)
    (scratch / "codes").write_text(json.dumps(codes))
    os.kill(store, signal.SIGKILL)
    return 0


def _start_store() -> tuple[int, str]:
    """Start a process that holds the store of the ranks, as torchrun does; return its id and its port.

    The store binds to a free port itself: a port that is chosen first and used later may be taken in between.
    """
    from torch.distributed import TCPStore

    ports, port = os.pipe()

    def hold() -> int:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(port, str(store.port).encode())
        os.close(port)
        while True:
            signal.pause()

    process = _fork(hold)
    os.close(port)
    with open(ports) as file:
        return process, file.read()


def _rank(arguments: list[str], rank: int, setup: Any, scratch: Path) -> int:
    from sft_recipe import main_sft
    from sft_recipe.tracking.metrics_file import MetricsFile

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    add = MetricsFile.add

    def note_first(self: MetricsFile, row: dict[str, Any]) -> None:
        MetricsFile.add = add
        (scratch / "first_step").write_text(str(time.monotonic()))
        add(self, row)

    MetricsFile.add = note_first
    if setup:
        module, _, name = setup[0].partition(":")
        getattr(import_module(module), name)(rank=rank, **setup[1])
    return main_sft.main(arguments)


def _fork(act: Callable[[], int]) -> int:
    """Return the id of a child process, which exits with the code that `act` returns."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = act()
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reap(group: int) -> None:
    """Wait until no process of the group is left; this process adopts those that outlive their parent."""
    while True:
        try:
            os.waitpid(-group, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    _serve()
