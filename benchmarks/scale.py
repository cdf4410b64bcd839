"""What size costs: millions of conversations prepared, and the plans of a thousand ranks.

    python benchmarks/scale.py --data ../shared/data/alpaca_en_999.json ../shared/data/alpaca_zh_1000.json

Every run is a separate process. The conversations are written to the folder for temporary files, and removed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmarks.prepare.corpus import resample  # noqa: E402
from benchmarks.prepare.measure import Measured, RunFailed, measure  # noqa: E402
from benchmarks.results import machine, table, write_section  # noqa: E402
from sft_recipe.models.gguf import convert_gguf, embedded_gguf  # noqa: E402

CACHE = Path("~/.cache/sft_recipe").expanduser()
PLANNED, RANKS, BATCH_SIZE, BUDGET, STEPS = 10_000_000, 1024, 65_536, 16_384, 20
MEBIBYTE = 2**20

NOTES = """\
The conversations are those of "Preparing data", in JSON lines. Memory is the peak of all processes together, sampled
five times a second: without pages of files, and pages that processes share counted once. "Again" is a second start.
"Order and plan" are the examples of an epoch in their order, and the first plan. A step waits for its plan and builds
the batch of its rank; then come about 0.5 s of small operations, with the thread that plans beside them and without it
(medians of 40 and of 20 steps). Where other programs use the cores, CPU times say more."""

out = Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="scale-") as work:
        prepared = [prepare(Path(work), options.data, size) for size in options.sizes]
    planned = run("run_step_path.py", PLANNED, RANKS, BATCH_SIZE, BUDGET, STEPS)
    text = section(prepared, planned, options)
    out.print(text, markup=False)
    if not options.no_results:
        write_section("scale", text)
        out.print("Written to benchmarks/RESULTS.md")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    examples = sorted((ROOT / "data").glob("example_*.json*"))
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[200_000, 2_000_000], metavar="N", help="records; none: plans only"
    )
    parser.add_argument("--data", type=Path, nargs="+", default=examples, metavar="FILE", help="what to resample")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    return parser.parse_args()


def prepare(work: Path, files: list[Path], size: int) -> list[str]:
    """Prepare so many conversations twice; returns a row of the table."""
    corpus, tokenizer = work / "corpus.jsonl", work / "tokenizer"
    with out.status(f"writing {size:,} conversations"), corpus.open("w", encoding="utf-8") as file:
        for turns in resample(files, size):
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    AutoTokenizer.from_pretrained(convert_gguf(embedded_gguf(), CACHE)).save_pretrained(tokenizer)
    with tempfile.TemporaryDirectory(dir=work) as cache, out.status(f"preparing {size:,} conversations"):
        first, again = (run("run_ours.py", corpus, tokenizer, cache) for _ in range(2))
    return [
        f"{size:,}",
        f"{corpus.stat().st_size / MEBIBYTE:,.0f}",
        f"{first.seconds:,.0f}",
        f"{first.anonymous / MEBIBYTE:,.0f}",
        f"{again.seconds:.1f}",
        f"{again.anonymous / MEBIBYTE:,.0f}",
    ]


def run(runner: str, *arguments: object) -> Measured:
    return measure(sys.executable, runner, *arguments, environment={"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})


def section(prepared: list[list[str]], planned: Measured, options: argparse.Namespace) -> str:
    """The section of RESULTS.md, without folders of this machine."""
    data = [path.name if path.is_absolute() else str(path) for path in options.data]
    command = ["python benchmarks/scale.py --sizes", *map(str, options.sizes)]
    command += ["--data", *data] if prepared else []
    facts = {name: f"{1000 * planned.facts[name]:,.1f}" for name in ("wait", "build", "beside", "alone")}
    plans = [f"{PLANNED:,}", f"{planned.seconds:.1f}", f"{planned.facts['cpu']:.1f}", f"{RANKS:,}", f"{BATCH_SIZE:,}"]
    return "\n\n".join(
        [
            "## What size costs",
            f"    {' '.join(command)}",
            f"{machine()}.",
            NOTES,
            *([table(["records", "MiB", "s", "peak MiB", "again s", "again peak MiB"], prepared)] if prepared else []),
            table(
                ["examples", "order and plan s", "CPU s", "ranks", "a step", "wait ms", "build CPU ms", "beside ms"]
                + ["alone ms"],
                [[*plans, *facts.values()]],
            ),
        ]
    )


if __name__ == "__main__":
    try:
        main()
    except RunFailed as error:
        sys.exit(f"error: {error}")
