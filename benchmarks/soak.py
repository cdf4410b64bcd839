"""Checks that a long run keeps its speed and memory: benchmarks/soak.py [--steps 500] [flags and overrides of train.sh]

SmolLM2-135M (the embedded model) on the example data, through ./train.sh. Writes its section of RESULTS.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import machine, table, write_section  # noqa: E402

PARTS = 10
DEFAULTS = ["--model", "SmolLM2-135M-Instruct", "--batch_size", "2", "--micro_batch_size", "2", "--max_length", "512"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ROOT / "train.sh"), *DEFAULTS, *words, "--output_dir", folder]
        command += [f"trainer.total_training_steps={options.steps}", "trainer.save_freq=-1"]
        subprocess.run(command, check=True, env=os.environ | {"VIRTUAL_ENV": sys.prefix})
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    flags = " ".join([f"--steps {options.steps}", *words])
    minutes = sum(row["perf/seconds"] for row in rows) / 60
    section = f"""## A long run

`benchmarks/soak.py {flags}`; {machine()}.
{len(rows)} steps in {minutes:.0f} minutes, by tenths; memory is the most in GB at the end of a step.

{table(["steps", "tokens/s", "memory", "mean loss"], [describe(part) for part in tenths(rows)])}
"""
    print(section)
    write_section("soak", section)


def tenths(rows: list[dict]) -> list[list[dict]]:
    bounds = [len(rows) * part // PARTS for part in range(PARTS + 1)]
    return [rows[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False) if end > begin]


def describe(rows: list[dict]) -> list[str]:
    """Return the steps, speed, memory and loss of a part of the run."""
    seconds, tokens = (sum(row[key] for row in rows) for key in ("perf/seconds", "train/tokens"))
    memory = max(row["perf/memory_gb"] for row in rows)
    loss = mean(row["train/loss"] for row in rows)
    return [f"{rows[0]['step']} to {rows[-1]['step']}", f"{tokens / seconds:,.0f}", f"{memory:.2f}", f"{loss:.3f}"]


if __name__ == "__main__":
    main()
