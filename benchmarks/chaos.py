"""Kills runs in every phase and at random moments, and reports how they resumed: benchmarks/chaos.py --kills 200

The runs have two ranks and a tiny model, full and LoRA, with and without asynchronous saving; they are forked from a
process that has imported everything, so that a start takes a second. Writes its section of RESULTS.md.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import machine, table, write_section
from tests.support import tiny
from tests.support.chaos import KillReport, kill_and_resume
from tests.support.small_run import arguments
from tests.support.warm import Warm

VARIANTS = {
    "full": ["trainer.async_save=false"],
    "full, async": [],
    "LoRA": ["lora.enabled=true", "trainer.async_save=false"],
    "LoRA merged, async": ["lora.enabled=true", "lora.merge=true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all variants together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder, Warm() as warm:
        model = tiny.build_model(Path(folder) / "model", attention_dropout=0.1)
        for number, (variant, extra) in enumerate(VARIANTS.items()):
            whole, killed = Path(folder) / f"whole-{number}", Path(folder) / f"killed-{number}"
            end = warm.run(arguments(model, whole, *extra), ranks=2)
            assert end.code == 0, end.output
            kills = options.kills // len(VARIANTS) + (number < options.kills % len(VARIANTS))
            run = arguments(model, killed, *extra)
            results[variant] = kill_and_resume(warm, run, whole / "out", killed / "out", options.seed + number, kills)
            print(variant, results[variant], flush=True)
    section = report(results, options.kills, options.seed, time.monotonic() - began)
    print(section)
    write_section("chaos", section)


def report(results: dict[str, KillReport], kills: int, seed: int, seconds: float) -> str:
    """The section of RESULTS.md."""
    header = ["run", "kills survived", "runs completed", "of them equal", "resumed from a checkpoint", "s to resume"]
    rows = []
    for variant, report in results.items():
        equal = "all" if not report.differences else f"NOT: {report.differences[:3]}"
        resume = f"{statistics.mean(report.seconds_to_first_step):.1f}"
        rows.append([variant, str(report.count), str(report.runs), equal, str(report.resumed), resume])
    phases: dict[str, int] = {}
    for report in results.values():
        for phase, count in report.kills.items():
            phases[phase] = phases.get(phase, 0) + count
    return f"""## Killed again and again

`benchmarks/chaos.py --kills {kills} --seed {seed}`, {seconds / 60:.0f} min; {machine()}.
Runs of 10 steps on 2 CPU ranks (fsdp2, dropout, validation, a checkpoint after every other step), SIGKILL for all
ranks at once, `--resume_from auto`. Equal: weights, optimizer state, exported model and `metrics.jsonl` (without
`perf/`) are those of a run that never stopped, bit for bit. Seconds to resume: from the start of the processes, which
have all modules imported, to the first step's row in `metrics.jsonl`.

{table(header, rows)}

Where the kills fell: {", ".join(f"{phase} {count}" for phase, count in sorted(phases.items()))}."""


if __name__ == "__main__":
    main()
