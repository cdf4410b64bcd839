"""How fast we train, beside every peer: the same job, each with its own code, timed with one stopwatch.

    python benchmarks/train_speed.py --data ../shared/data/alpaca_en_999.json --validate

First every configuration of every system runs once; then, for --rounds rounds, ours and the fastest of each peer take
turns, in reverse order every other round. Measurements are kept, and an interrupted benchmark goes on with --resume.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from benchmarks.peers import ENVIRONMENTS, InstallFailed, python_of  # noqa: E402
from benchmarks.results import write_section  # noqa: E402
from benchmarks.speed.jobs import JOBS, SHAPES, Data, Job, make_data, plain_model, products_of  # noqa: E402
from benchmarks.speed.measure import (  # noqa: E402
    INSIDE,
    Measurement,
    RunFailed,
    counted_by_recipe,
    keep,
    kept,
    read_stopwatch,
    run,
)
from benchmarks.speed.report import MEBIBYTE, JobResult, section  # noqa: E402
from benchmarks.speed.systems import PEERS, Configuration, configurations, fastest, our_command  # noqa: E402
from sft_recipe.config.auto import has_fast_bf16  # noqa: E402
from sft_recipe.errors import RecipeError  # noqa: E402
from sft_recipe.models.peak_flops import measured_peak_flops  # noqa: E402

CACHE = Path("~/.cache/sft_recipe").expanduser()
WORK = CACHE / "benchmarks" / "train_speed"
VALIDATION_ENVIRONMENT = "trl"  # the environment that computes validation losses: plain transformers
CORES = str(len(os.sched_getaffinity(0)))

out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@dataclass(frozen=True)
class Task:
    """One run: round 0 is the scan of all configurations."""

    job: Job
    configuration: Configuration
    round: int

    def __str__(self) -> str:
        return f"{self.job.name}, {f'round {self.round}' if self.round else 'scan'}, {self.configuration}"


class Bench:
    """The runs of one benchmark: which Python each system has, what was measured, and what failed and why."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.pythons: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.data: dict[str, Data] = {}
        self.models: dict[str, Path] = {}
        self.found: dict[Task, Measurement] = {}
        self.recipe = _version_of_recipe()

    def set_up(self, jobs: list[Job]) -> None:
        """Environments, models, data."""
        needed = {one.environment for job in jobs for one in configurations(job, self.options.peers)} - {""}
        for name in sorted(needed | ({VALIDATION_ENVIRONMENT} if self.options.validate else set())):
            with out.status(f"The environment {name} (made once, takes minutes)"):
                try:
                    self.pythons[name] = python_of(name, CACHE / "benchmarks")
                except InstallFailed as problem:
                    self._fail(f"the installation of {name}", problem)
        for job in jobs:
            with out.status(f"The data and the model of {job.name}"):
                self.models[job.model] = plain_model(job.model, WORK / "models", CACHE)
                tokenizer = Tokenizer.from_file(str(self.models[job.model] / "tokenizer.json"))
                folder = WORK / "data" / f"{job.name}-{_digest(job.as_dict(), self.options.data.read_bytes())}"
                self.data[job.name] = make_data(job, self.options.data, tokenizer, folder)

    def steps(self, job: Job) -> int:
        """No more than an epoch has."""
        wanted = of_job(self.options.steps, job, 16)
        return min(wanted, max(1, self.data[job.name].counts.rows // job.batch_size))

    def measure(self, jobs: list[Job]) -> list[JobResult]:
        """All runs of all jobs, with progress; returns what the report needs of each job."""
        columns = TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=out, speed_estimate_period=36_000, disable=not out.is_terminal) as progress:
            for job in jobs:
                self._measure_job(job, progress)
        return [self._result(job) for job in jobs]

    def _measure_job(self, job: Job, progress: Progress) -> None:
        scan = [Task(job, one, 0) for one in self._configurations(job)]
        systems = {task.configuration.system for task in scan}
        bar = progress.add_task(job.name, total=len(scan) + self.options.rounds * len(systems))
        self._take_turns(scan, progress, bar)
        chosen = self._chosen(job)
        rounds = [
            Task(job, one, number)
            for number in range(1, self.options.rounds + 1)
            for one in chosen[:: -1 if number % 2 == 0 else 1]
        ]
        progress.update(bar, total=len(scan) + len(rounds))
        self._take_turns(rounds, progress, bar)

    def _take_turns(self, tasks: list[Task], progress: Progress, bar: Any) -> None:
        for task in tasks:
            progress.update(bar, description=str(task))
            name = f"{task.job.name}: {task.configuration}"
            try:
                if name not in self.failures and (measured := self._kept_or_run(task)):
                    self.found[task] = measured
            except RunFailed as problem:
                self._fail(name, problem, f"; {WORK / 'logs'} has its complete output")
            progress.advance(bar)

    def _configurations(self, job: Job) -> list[Configuration]:
        return [
            one
            for one in configurations(job, self.options.peers)
            if not one.environment or one.environment in self.pythons
        ]

    def _chosen(self, job: Job) -> list[Configuration]:
        """The fastest configuration of each system, by the scan."""
        speeds = {task.configuration: self.found[task].tokens_per_s for task in self._tasks(job) if task.round == 0}
        systems = dict.fromkeys(one.system for one in speeds)
        return [best for system in systems if (best := fastest(speeds, system))]

    def _tasks(self, job: Job) -> list[Task]:
        return [task for task in self.found if task.job == job]

    def _result(self, job: Job) -> JobResult:
        runs: dict[Configuration, dict[int, Measurement]] = {}
        for task in self._tasks(job):
            runs.setdefault(task.configuration, {})[task.round] = self.found[task]
        products = products_of(self.models[job.model], job.lora.rank if job.lora else 0)
        counts = self.data[job.name].counts
        before = self._loss_before(job) if self._can_validate(job) and runs else None
        return JobResult(job, counts, products, self.steps(job), runs, self._chosen(job), before)

    def _kept_or_run(self, task: Task) -> Measurement | None:
        """What is kept where that is asked for, else a new run. Raises RunFailed."""
        about = self._about(task)
        name = f"{task.job.name}-{task.configuration.system}-{task.round}-{_digest(about)}"
        path = WORK / "results" / f"{name}.json"
        measured = kept(path) if self.options.resume or self.options.report else None
        validate = self._can_validate(task.job) and task.round == 0 and task.configuration.same_job
        if self.options.report or measured and not (validate and measured.validation_loss is None):
            return measured
        log = WORK / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORK, prefix="run-") as folder:
            measured = self._run(task, Path(folder), log, validate)
        keep(measured, about, path)
        speed, memory = measured.tokens_per_s, (measured.gpu_peak or measured.peak) / MEBIBYTE
        loss = f", validation loss {measured.validation_loss:.4f}" if measured.validation_loss is not None else ""
        others = f", others took {measured.others_cpu:.0%} of the CPUs" if measured.others_cpu > 0.05 else ""
        out.print(f"{task}: {speed:,.0f} tokens/s, {memory:,.0f} MiB{loss}{others}")
        return measured

    def _about(self, task: Task) -> dict[str, Any]:
        """All that a measurement depends on."""
        one = task.configuration
        environment = ENVIRONMENTS[one.environment].text if one.environment else self.recipe
        return {
            "job": task.job.as_dict(),
            "data": self.data[task.job.name].folder.name,
            "system": one.system,
            "configuration": one.name,
            "options": one.options,
            "steps": self.steps(task.job),
            "round": task.round,
            "cores": CORES,
            "versions": environment,
        }

    def _run(self, task: Task, folder: Path, log: Path, validate: bool) -> Measurement:
        job, one, data = task.job, task.configuration, self.data[task.job.name]
        threads = str(max(1, int(CORES) // one.ranks))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HOME": str(WORK / "hub")}
        environment |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        environment |= {
            "WANDB_MODE": "disabled",
            "DISABLE_VERSION_CHECK": "1",
            "TRITON_CACHE_DIR": str(WORK / "triton"),
        }
        if job.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        saved = folder / "final"
        peak_flops = measured_peak(job)
        if one.environment:
            job_file = self._write_job(task, folder, saved if validate else None)
            command = [self.pythons[one.environment], str(INSIDE / one.runner), str(job_file)]
        else:
            words = our_command(job, one, self.models[job.model], data.folder / "train.jsonl", self.steps(job), folder)
            command = [str(ROOT / "train.sh"), *words]
            environment["VIRTUAL_ENV"] = sys.prefix
            saved = folder / "checkpoints" / f"step_{self.steps(job)}" / "huggingface"
        ran = run(command, environment, log, folder / "stopwatch")
        measured = read_stopwatch(folder / "stopwatch", ran, peak_flops)
        if not one.environment:
            measured = counted_by_recipe(measured, folder / "metrics.jsonl")
        if validate:
            try:
                measured = measured.with_validation_loss(self._validation_loss(saved, job))
            except RunFailed as problem:
                self._fail(f"judging the model of {task}", problem)
        return measured

    def _write_job(self, task: Task, folder: Path, save: Path | None) -> Path:
        """Write the job file of a runner."""
        job, one, data = task.job, task.configuration, self.data[task.job.name].folder
        about = job.as_dict() | {
            "model": str(self.models[job.model]),
            "train": str(data / "train.jsonl"),
            "parquet": str(data / "train.parquet"),
            "steps": self.steps(job),
            "micro_tokens": one.micro_tokens,
            "options": one.options,
            "out": str(folder),
            "save": str(save) if save else None,
        }
        path = folder / "job.json"
        path.write_text(json.dumps(about))
        return path

    def _can_validate(self, job: Job) -> bool:
        """After an epoch, if the model knew something before, and has not read the other rows in its contexts."""
        is_epoch = self.steps(job) * job.batch_size == self.data[job.name].counts.rows
        return self.options.validate and is_epoch and job.model not in SHAPES and not job.long

    def _loss_before(self, job: Job) -> float | None:
        """The loss of the untrained model."""
        path = WORK / "results" / f"before-{_digest(job.as_dict(), self.data[job.name].folder.name)}.json"
        if not path.is_file():
            if self.options.report:
                return None
            try:
                path.write_text(json.dumps(self._validation_loss(self.models[job.model], job)))
            except RunFailed as problem:
                self._fail("judging the untrained model", problem)
                return None
        return json.loads(path.read_text())

    def _validation_loss(self, model: Path, job: Job) -> float:
        """The validation loss. Raises RunFailed."""
        records = self.data[job.name].folder / "validation.jsonl"
        arguments = map(str, (model, self.models[job.model], records, job.max_length))
        command = [self.pythons[VALIDATION_ENVIRONMENT], str(INSIDE / "validation_loss.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": CORES})
        if done.returncode:
            output = done.stderr.strip().splitlines()
            raise RunFailed(f"the validation failed: {output[-1] if output else done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])["loss"]

    def _fail(self, what: str, problem: Exception, hint: str = "") -> None:
        self.failures[what] = str(problem)
        out.print(f"{what} failed: {problem}{hint}", style="red", markup=False)


def measured_peak(job: Job) -> float:
    """FLOP/s of the job's matrix products: on a CPU measured now, on a GPU what its maker says of bfloat16."""
    if job.device == "cpu":
        return measured_peak_flops({"bf16": torch.bfloat16, "fp32": torch.float32}[job.compute], "cpu", seconds=1.0)
    from verl.utils.flops_counter import get_device_flops

    return get_device_flops("B")


def main() -> None:
    options = parse_options()
    options.compute = options.compute or fast_numbers(options.device)
    jobs = [job for name, job in JOBS[options.device].items() if name in options.jobs]
    jobs = [
        replace(
            job,
            compute=options.compute,
            rows=of_job(options.rows, job, job.rows),
            batch_size=of_job(options.batch_size, job, job.batch_size),
        )
        for job in jobs
    ]
    bench = Bench(options)
    bench.set_up(jobs)
    results = [result for result in bench.measure(jobs) if result.runs]
    text = section(results, bench.failures, options.device, command_line(options))
    out.print(text, markup=False, soft_wrap=True)
    if not options.no_results:
        kind = "_gpu" if options.device == "cuda" else "_fp32" if options.compute == "fp32" else ""
        write_section(f"train_speed{kind}", text)
        out.print("Written to benchmarks/RESULTS.md")


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for jobs in JOBS.values() for name in jobs))
    peers = ",".join(PEERS)
    parser.add_argument("--device", choices=list(JOBS), default="cpu")
    parser.add_argument("--compute", choices=["bf16", "fp32"], help="numbers that all compute in on a CPU (fast ones)")
    parser.add_argument("--jobs", type=_names_of(names), default=names, help=f"some of {','.join(names)}")
    parser.add_argument("--peers", type=_names_of(list(PEERS)), default=list(PEERS), help=f"some of {peers}, or none")
    parser.add_argument("--data", type=Path, default=ROOT / "data/example_alpaca.json", help="what is trained")
    parser.add_argument("--rounds", type=int, default=5, help="after the scan of all configurations")
    steps = "optimizer steps of a run, at most an epoch (16); this and the next two also for single jobs: 16,long=4"
    parser.add_argument("--steps", type=_by_job, default="16", help=steps)
    parser.add_argument("--rows", type=_by_job, default={}, help="examples of an epoch, for a quick look")
    parser.add_argument("--batch-size", type=_by_job, default={}, help="examples a step, for a quick look")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="validation loss after a complete epoch",
    )
    parser.add_argument("--resume", action="store_true", help="run only what no measurement is kept of")
    parser.add_argument("--report", action="store_true", help="run nothing; make the report from what is kept")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    options = parser.parse_args(words)
    if options.device == "cuda" and options.compute == "fp32":
        parser.error("--compute fp32 is for --device cpu")
    return options


def fast_numbers(device: str) -> str:
    return "bf16" if device == "cuda" or has_fast_bf16() else "fp32"


def command_line(options: argparse.Namespace) -> str:
    """To be read; without folders of this machine."""
    data = options.data.name if options.data.is_absolute() else options.data
    words = [f"--device {options.device}", f"--compute {options.compute}", f"--jobs {','.join(options.jobs)}"]
    words += [f"--peers {','.join(options.peers) or 'none'}", f"--data {data}"]
    words += [f"--rounds {options.rounds}", *(["--validate"] if options.validate else [])]
    for name, numbers in (("steps", options.steps), ("rows", options.rows), ("batch-size", options.batch_size)):
        if numbers:
            of_jobs = (f"{job}={number}" if job else f"{number}" for job, number in numbers.items())
            words.append(f"--{name} {','.join(of_jobs)}")
    return f"python benchmarks/train_speed.py {' '.join(words)}"


def _names_of(known: list[str]) -> Any:
    def names(text: str) -> list[str]:
        chosen = [] if text == "none" else text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there is {', '.join(known)}")
        return chosen

    return names


def _by_job(text: str) -> dict[str, int]:
    """By the name of the job; the empty name is that of all others."""
    parts = [part.rpartition("=") for part in text.split(",")]
    return {name: int(number) for name, _, number in sorted(parts)}


def of_job(numbers: dict[str, int], job: Job, default: int) -> int:
    return numbers.get(job.name, numbers.get("", default))


def _version_of_recipe() -> str:
    """The tree of our package, and what was changed in it: measurements of other code are not ours."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("diff", "HEAD", "--", "sft_recipe")
    return f"{git('rev-parse', '--short', 'HEAD:sft_recipe')}{'-' + _digest(changed) if changed else ''}"


def _digest(*parts: Any) -> str:
    """Short; of texts, bytes and what JSON can hold."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
