"""Trains on this machine's GPUs with every strategy, and compares with the CPU.

    python -m benchmarks.gpu_check            prints the table
    python -m benchmarks.gpu_check --write    and puts it into docs/gpu.md

Each case trains four steps of SmolLM2-135M-Instruct (another model: --model) on the GPUs. Its losses and gradient norms
must equal those of a CPU run, up to the rounding of its dtype. The table has tokens/s, MFU, and the peak memory beside
the predicted one. Exits with 1 if a case differs or fails, with 2 without a GPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.results import machine, table, write_section

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/gpu.md"
STEPS = 4
HEADER = ["case", "GPUs", "dtype", "difference from the CPU", "tokens/s", "MFU", "peak", "predicted"]
TOLERANCE = {"bf16": 2e-2, "fp16": 1e-2, "fp32": 1e-3}
STRATEGIES = {
    "fsdp": ["fsdp.strategy=fsdp"],
    "fsdp2": ["fsdp.strategy=fsdp2"],
    "fsdp, offloaded": ["fsdp=fsdp_offload"],
    "fsdp2, offloaded": ["fsdp=fsdp2_offload"],
}


@dataclass(frozen=True)
class Case:
    """One run on GPUs."""

    name: str
    overrides: list[str]
    gpus: int


@dataclass(frozen=True)
class Run:
    """The rows of a run's steps; `predicted` is the memory in GiB that its banner names, `problem` why it failed."""

    rows: list[dict]
    predicted: float | None
    dtype: str
    problem: str


def cases(gpus: int) -> list[Case]:
    """Return the cases for a machine with this many GPUs."""
    found = []
    for count in sorted({1, gpus}):
        for strategy, overrides in STRATEGIES.items():
            for method, more in (("full", []), ("LoRA", ["lora.enabled=true"])):
                for state in ("false", "true"):
                    name = f"{strategy}, {method}" + (", checkpointing" if state == "true" else "")
                    chosen = [*overrides, *more, f"model.enable_gradient_checkpointing={state}"]
                    found.append(Case(name, chosen, count))
        found.append(Case("fsdp2, full, fp32", [*STRATEGIES["fsdp2"], "fsdp.mixed_precision.param_dtype=fp32"], count))
    return found


def train(model: str, case: Case, device: str, folder: Path) -> Run:
    """Train the steps of a case on "cuda" or "cpu" and return what it logged."""
    command = [
        sys.executable, "-m", "sft_recipe.cli.train", f"--model={model}", f"--output_dir={folder}", "--batch_size=16",
        "--micro_batch_size=2", "--max_length=1024", f"--n_gpus={case.gpus if device == 'cuda' else 1}",
        f"trainer.device={device}", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1",
        "optim.lr_scheduler_type=constant", *case.overrides,
    ]  # fmt: skip
    if device == "cpu":
        command.append("fsdp.mixed_precision.param_dtype=fp32")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    text = " ".join(done.stdout.replace("│", " ").split())
    predicted = re.search(r"needs about ([\d.]+) of", text)
    dtype = re.search(r", (bf16|fp16|fp32), gradient checkpointing", text)
    problem = (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
    return Run(
        [row for row in rows if row["step"]], predicted and float(predicted[1]), dtype[1] if dtype else "?", problem
    )


def difference(ours: Run, reference: Run) -> float:
    """Return the largest relative difference of losses and gradient norms of all steps; infinite without steps."""
    pairs = list(zip(ours.rows, reference.rows, strict=False))
    if len(pairs) < STEPS:
        return float("inf")
    keys = "train/loss", "train/grad_norm"
    return max(abs(row[key] - other[key]) / max(1e-6, abs(other[key])) for row, other in pairs for key in keys)


def rows_of(results: list[tuple[Case, Run, float]]) -> list[list[str]]:
    """Return the results as rows of the table."""
    rows = []
    for case, run, differs in results:
        if run.problem:
            rows.append([case.name, str(case.gpus), run.dtype, f"failed: {run.problem}", "", "", "", ""])
            continue
        last, peak = run.rows[-1], max(row["perf/memory_gb"] for row in run.rows)
        mfu = "-" if last["perf/mfu"] is None else f"{100 * last['perf/mfu']:.1f}%"
        predicted = "-" if run.predicted is None else f"{run.predicted} GiB"
        speed = f"{last['perf/tokens_per_s']:,.0f}"
        rows.append([case.name, str(case.gpus), run.dtype, f"{differs:.1e}", speed, mfu, f"{peak:.2f} GiB", predicted])
    return rows


def main(args: list[str]) -> int:
    """Run all cases, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--write", action="store_true", help="write the table into docs/gpu.md")
    options = parser.parse_args(args)
    count = torch.cuda.device_count()
    if not count:
        print("error: this machine has no GPU that PyTorch sees", file=sys.stderr)
        return 2
    results, references = [], {}
    with tempfile.TemporaryDirectory() as work:
        for number, case in enumerate(cases(count)):
            method = "lora.enabled=true" in case.overrides
            if method not in references:
                reference = Case("reference", ["lora.enabled=true"] if method else [], 1)
                references[method] = train(options.model, reference, "cpu", Path(work) / f"cpu{method}")
            run = train(options.model, case, "cuda", Path(work) / str(number))
            results.append((case, run, difference(run, references[method])))
            print(f"{case.name} on {case.gpus}: {run.problem or f'{results[-1][2]:.1e}'}", flush=True)
    text = f"{machine()}\n\n{table(HEADER, rows_of(results))}"
    print(text)
    if options.write:
        write_section("gpu_check", text, PAGE)
    return int(any(run.problem or differs > TOLERANCE[run.dtype] for _, run, differs in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
