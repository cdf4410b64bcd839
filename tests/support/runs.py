"""Run the program in tests: in this process as its only rank, or with ./train.sh. See warm.py for several ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_here(*args: str) -> int:
    """Run main_sft in this process, as its only rank; return the exit code."""
    from sft_recipe import main_sft

    before = dict(os.environ)
    try:
        return main_sft.main(list(args))
    finally:
        os.environ.clear()
        os.environ.update(before)


def launch(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ./train.sh as a user types it."""
    return subprocess.run(
        [str(ROOT / "train.sh"), *args],
        cwd=ROOT,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, **environment},
        text=True,
        capture_output=True,
        timeout=600,
    )


def all_rows(output_dir: Path) -> list[dict]:
    """Return the rows of metrics.jsonl, that of the evaluation before training among them."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def metrics(output_dir: Path) -> list[dict]:
    """Return the rows of the optimizer steps."""
    return [row for row in all_rows(output_dir) if row["step"]]
