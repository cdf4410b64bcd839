"""How fast data becomes tokens with masks: ours, TRL's and verl's own preparation of the same records; and planning.

    python benchmarks/prepare_speed.py --data ../shared/data/alpaca_en_999.json ../shared/data/alpaca_zh_1000.json

Every run is a separate process; the systems take turns; the peers live in environments that are made here, once.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmarks.peers import ENVIRONMENTS, TORCH, InstallFailed, python_of  # noqa: E402
from benchmarks.prepare.corpus import write_corpora  # noqa: E402
from benchmarks.prepare.measure import Measured, RunFailed, measure  # noqa: E402
from benchmarks.prepare.report import MEBIBYTE, Part, report  # noqa: E402
from benchmarks.prepare.systems import OURS, SYSTEMS, Plans, Run, Runs, System  # noqa: E402
from benchmarks.results import machine, table, write_section  # noqa: E402
from sft_recipe.errors import RecipeError  # noqa: E402
from sft_recipe.models.gguf import EMBEDDED, convert_gguf, embedded_gguf  # noqa: E402

CACHE = Path("~/.cache/sft_recipe").expanduser()
PEERS = ["trl", "verl"]
PLANNED = 1_000_000
PLANS = ((8, 256), (1024, 16384))  # ranks, examples a step
BUDGET = 16384  # tokens of a micro-batch

NOTES = f"""\
The conversations are resampled from real ones: the sentences of answers shuffled, a third of them exchanged, each
conversation, numbered. All systems use the tokenizer of {EMBEDDED}. The clock starts when a process
has done its imports and loaded the tokenizer ("start" is the time before that), and stops when every token and mask
is there; worker processes start inside it. "Peak" is the resident memory of all processes of a run together, sampled
five times a second; pages that they share count for each. "Again" is a second start on unchanged data. Each system gets
the file that it reads best, made before: JSON lines, for verl Parquet. TRL uses as many processes as there are cores,
or its default; verl as many loader workers as cores. verl keeps nothing: it does this work in every epoch anew.
TRL's completion-only and verl also supervise the line break after a turn, ours and TRL's assistant-only do not."""

out = Console(width=None if sys.stdout.isatty() else 120)


class Bench:
    """The runs of one benchmark: where they work, which Python each peer has, and what failed and why."""

    def __init__(self, work: Path):
        self.work = work
        self.pythons = {"": sys.executable}
        self.failures: dict[str, str] = {}

    def set_up(self, peers: Iterable[str], files: list[Path], sizes: list[int]) -> list[System]:
        """Environments, tokenizer, corpora; returns the systems that can run."""
        for peer in peers:
            with out.status(f"The environment of {peer} (made once, takes minutes)"):
                try:
                    self.pythons[peer] = python_of(peer, CACHE / "benchmarks")
                except InstallFailed as problem:
                    self._fail(f"the installation of {peer}", problem)
        with out.status(f"The corpus of {max(sizes):,} records"):
            tokenizer = AutoTokenizer.from_pretrained(convert_gguf(embedded_gguf(), CACHE))
            tokenizer.save_pretrained(self.work / "tokenizer")  # the same for all, without weights beside it
            write_corpora(files, sizes, self.work)
        return [system for system in SYSTEMS if system.peer in self.pythons]

    def measure_systems(self, systems: list[System], sizes: list[int], repeats: int) -> Runs:
        """Every system at every size and repeat, every other time in reverse order."""
        runs: Runs = {}
        for size in sizes:
            for repeat in range(repeats):
                for system in systems[:: -1 if repeat % 2 else 1]:
                    if system.name in self.failures:
                        continue
                    title = f"{size:,} records, {repeat + 1} of {repeats}, {system.name}"
                    try:
                        with out.status(title):
                            run = self._prepare(system, size)
                    except RunFailed as problem:
                        self._fail(system.name, problem)
                        continue
                    runs.setdefault((size, system.name), []).append(run)
                    out.print(f"{title}: {run.first.seconds:.1f} s, {run.first.peak / MEBIBYTE:,.0f} MiB")
        return runs

    def measure_plans(self) -> Plans:
        """One epoch of a million examples, as long as those of the corpus, for few and for many ranks."""
        plans = {}
        for ranks, batch_size in PLANS:
            title = f"planning {PLANNED:,} examples for {ranks:,} ranks"
            numbers = PLANNED, ranks, batch_size, BUDGET
            try:
                with out.status(title):
                    plans[ranks, batch_size] = self._measure("", "run_planning.py", self.work / "lengths.npy", *numbers)
            except RunFailed as problem:
                self._fail(title, problem)
        return plans

    def _prepare(self, system: System, size: int) -> Run:
        """From nothing, and a second time where something was kept."""
        corpus = self.work / f"{size}.{system.corpus}"
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            cache = Path(name)
            arguments = corpus, self.work / "tokenizer", cache, *system.options
            first = self._measure(system.peer, system.runner, *arguments)
            stored = sum(file.stat().st_size for file in cache.rglob("*") if _is_stored(file))
            again = self._measure(system.peer, system.runner, *arguments).seconds if system.keeps else 0.0
            if system is OURS:
                shutil.copy(cache / "lengths.npy", self.work)
        return Run(first, stored, again)

    def _measure(self, peer: str, runner: str, *arguments: object) -> Measured:
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.work / "hub"),
            "PYTHONPATH": "" if peer else str(ROOT),
        }
        return measure(self.pythons[peer], runner, *arguments, environment=environment)

    def _fail(self, what: str, problem: Exception) -> None:
        self.failures[what] = str(problem)
        out.print(f"{what} failed: {problem}", style="red")


def main() -> None:
    options = parse_options()
    (CACHE / "benchmarks").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE / "benchmarks", prefix="prepare_speed-") as work:
        bench = Bench(Path(work))
        systems = bench.set_up(options.peers, options.data, options.sizes)
        runs = bench.measure_systems(systems, options.sizes, options.repeats)
        parts = report(systems, options.sizes, runs, bench.measure_plans())
    show(parts, bench.failures)
    if not options.no_results:
        write_section("prepare_speed", section(parts, bench.failures, options))
        out.print("Written to benchmarks/RESULTS.md")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    examples = sorted((ROOT / "data").glob("example_*.json*"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000], metavar="N", help="records")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="whom to compare with")
    parser.add_argument("--data", type=Path, nargs="+", default=examples, metavar="FILE", help="what to resample")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of every run; medians are shown")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    options = parser.parse_args()
    options.sizes = sorted(set(options.sizes))
    return options


def show(parts: list[Part], failures: dict[str, str]) -> None:
    for part in parts:
        shown = Table(title=part.title, title_justify="left")
        for column in part.header:
            shown.add_column(column, justify="left" if column == "system" else "right")
        for row in part.rows:
            shown.add_row(*row)
        out.print(shown)
    for what, problem in failures.items():
        out.print(f"{what} failed: {problem}", style="red")


def section(parts: list[Part], failures: dict[str, str], options: argparse.Namespace) -> str:
    """For RESULTS.md; without folders of this machine, and so without what a failed runner said."""
    data = [path.name if path.is_absolute() else str(path) for path in options.data]
    chosen = {"sizes": options.sizes, "peers": options.peers, "data": data, "repeats": [options.repeats]}
    flags = [f"--{name} {' '.join(map(str, values))}" for name, values in chosen.items()]
    pins = [f"{peer}: {', '.join([*ENVIRONMENTS[peer].packages, TORCH])}" for peer in options.peers]
    return "\n\n".join(
        [
            "## Preparing data, and planning an epoch",
            "    python benchmarks/prepare_speed.py " + " ".join(flags),
            ". ".join([machine(), *pins]) + ".",
            NOTES,
            *(f"{part.title}:\n\n{table(part.header, part.rows)}" for part in parts),
            *(f"**Failed: {what}.** The command shows why." for what in failures),
        ]
    )


def _is_stored(file: Path) -> bool:
    return file.is_file() and ("tokens" in file.parts or file.suffix == ".arrow")


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
