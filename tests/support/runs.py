"""Running the program in tests: in this process for one rank, under torchrun for several."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_here(*args: str) -> int:
    """main_sft in this process, as its only rank; returns the exit code."""
    from sft_recipe import main_sft

    before = dict(os.environ)
    try:
        return main_sft.main(list(args))
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_ranks(ranks: int, *runs: list[str]) -> subprocess.CompletedProcess:
    """Several runs one after the other under one torchrun, which saves the imports of all but the first."""
    return torchrun(ranks, "-m", "tests.support.runs", json.dumps([[_free_port(), arguments] for arguments in runs]))


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess:
    """A program under torchrun, as a user starts it without the launcher."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def launch(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """./train.sh as a user types it, with a terminal's patience."""
    return subprocess.run(
        [str(ROOT / "train.sh"), *args],
        cwd=ROOT,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, **environment},
        text=True,
        capture_output=True,
        timeout=600,
    )


def metrics(output_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    from sft_recipe import main_sft

    for port, arguments in json.loads(sys.argv[1]):
        # A process group of its own for each run: torchrun's store remembers the one before.
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
        code = main_sft.main(arguments)
        if code:
            sys.exit(code)
