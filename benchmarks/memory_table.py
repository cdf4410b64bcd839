"""Compares the memory estimate with measured runs on CPUs and with rehearsed steps on GPUs, and writes docs/memory.md.

    python -m benchmarks.memory_table            both tables; --write puts them into docs/memory.md
    python -m benchmarks.memory_table cpu        the runs of benchmarks/memory_runs.py, a minute each on two cores
    python -m benchmarks.memory_table gpu        steps of large models on GPUs that do not exist (engine/rehearsal)

What was measured is kept in build/memory_table: the command goes on where it was interrupted, and predicts again what
was measured before; with --stored it measures nothing more. Remove that folder to measure again.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.memory_runs import (
    BLOCKING,
    CHECKPOINTING,
    FP32,
    LORA,
    RESULTS,
    RUNS,
    Run,
    measured,
    model_config,
    predicted,
)
from benchmarks.results import machine, table, write_section
from sft_recipe.config.compose import load_config
from sft_recipe.engine.rehearsal.session import RehearsalFailed, RehearsalSession
from sft_recipe.engine.rehearsal.step import GPUS_PER_NODE, Case
from sft_recipe.models.memory_estimate import estimate_run
from sft_recipe.models.resolve import resolve_model
from sft_recipe.models.stats import StatsOf
from sft_recipe.models.workload import Workload
from sft_recipe.readiness.check import Machine, for_machine

PAGE = Path(__file__).resolve().parents[1] / "docs/memory.md"
GIB = 2**30
LOWEST, HIGHEST = -3.0, 10.0  # the target, in percent of the peak
RUN_HEADER = ["model", "method", "ranks", "micro-batch", "predicted", "measured", "difference"]
CASE_HEADER = [
    "model",
    "method",
    "GPUs",
    "tokens",
    "micro-batches",
    "checkpointing",
    "predicted",
    "rehearsed",
    "difference",
]
# The family, vocabulary, hidden and intermediate size, layers, heads, key-value heads, and whether the head is tied;
# the size of attention heads where they do not divide the hidden size.
MODELS = {
    "Qwen2.5-0.5B": ("Qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "Llama-3.2-1B": ("Llama", 128256, 2048, 8192, 16, 32, 8, True),
    "Llama-3.1-8B": ("Llama", 128256, 4096, 14336, 32, 32, 8, False),
    "Qwen2.5-7B": ("Qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "Mistral-7B": ("Mistral", 32768, 4096, 14336, 32, 32, 8, False),
    "Qwen3-1.7B": ("Qwen3", 151936, 2048, 6144, 28, 16, 8, True),
    "Gemma-3-1B": ("Gemma3Text", 262144, 1152, 6912, 26, 4, 1, True, 256),
    "Gemma-3-4B": ("Gemma3Text", 262208, 2560, 10240, 34, 8, 4, True, 256),
    "Qwen3-4B": ("Qwen3", 151936, 2560, 9728, 36, 32, 8, True, 128),
}
FSDP, FSDP2 = ["fsdp.strategy=fsdp"], ["fsdp.strategy=fsdp2"]
OFFLOAD = ["fsdp=fsdp2_offload"]
BY_MACHINE, QLORA = ["fsdp.fsdp_size=8"], ["fsdp.strategy=fsdp2", *LORA, "lora.quantize=true"]
# Model, overrides, GPUs, tokens of a micro-batch, micro-batches, checkpointing. These were seen when the formula was
# changed ...
CASES = [
    ("Qwen2.5-0.5B", FSDP, 1, 2048, 2, False),
    ("Qwen2.5-0.5B", FSDP2, 1, 2048, 2, False),
    ("Qwen2.5-0.5B", FSDP, 8, 4096, 1, True),
    ("Qwen2.5-0.5B", FSDP2, 8, 2048, 2, False),
    ("Llama-3.2-1B", FSDP + LORA, 1, 4096, 2, False),
    ("Llama-3.2-1B", FSDP2 + LORA, 1, 4096, 2, True),
    ("Llama-3.2-1B", OFFLOAD, 1, 2048, 1, True),
    ("Llama-3.2-1B", FSDP + LORA, 8, 2048, 2, True),
    ("Llama-3.2-1B", FSDP2 + LORA, 8, 2048, 1, False),
    ("Llama-3.2-1B", OFFLOAD, 8, 4096, 2, True),
    ("Llama-3.2-1B", FSDP, 1, 4096, 1, False),
    ("Llama-3.1-8B", FSDP2, 8, 8192, 1, True),
    ("Qwen2.5-7B", FSDP + LORA, 1, 2048, 2, True),
    ("Qwen2.5-7B", FSDP2, 8, 4096, 2, True),
    ("Llama-3.1-8B", FSDP + LORA, 8, 4096, 1, False),
    ("Llama-3.1-8B", FSDP2 + BY_MACHINE, 16, 2048, 1, True),
    ("Mistral-7B", OFFLOAD, 1, 4096, 1, True),
    ("Qwen3-1.7B", FSDP, 8, 8192, 1, True),
    ("Qwen3-1.7B", FSDP2 + LORA, 1, 8192, 1, True),
    ("Gemma-3-1B", FSDP2, 8, 2048, 1, False),
    ("Qwen2.5-7B", QLORA, 1, 2048, 2, True),
    ("Llama-3.1-8B", QLORA, 8, 4096, 1, True),
    ("Qwen2.5-7B", FSDP2 + BY_MACHINE, 16, 4096, 1, True),
    ("Llama-3.1-8B", OFFLOAD, 1, 2048, 1, True),
]
# ... and these were not.
JUDGING_CASES = [
    ("Gemma-3-4B", FSDP2 + LORA, 1, 4096, 2, True),
    ("Gemma-3-4B", FSDP, 8, 2048, 2, True),
    ("Qwen3-4B", FSDP2, 8, 4096, 1, True),
    ("Qwen3-4B", QLORA, 1, 4096, 1, True),
    ("Mistral-7B", QLORA, 8, 2048, 2, True),
    ("Mistral-7B", FSDP + LORA, 1, 4096, 1, True),
    ("Qwen2.5-0.5B", FSDP2 + LORA, 1, 4096, 2, False),
    ("Llama-3.2-1B", FSDP, 8, 4096, 2, True),
    ("Qwen3-1.7B", FSDP2 + LORA, 8, 4096, 1, False),
]


NAMES = {
    "lora.enabled=true": "LoRA", "lora.merge=true": "merged", CHECKPOINTING[0]: "checkpointing",
    "fsdp=fsdp2_offload": "fsdp2, offloaded", BLOCKING[0]: "no copies",
    FP32[0]: "fp32", "lora.quantize=true": "4 bits", BY_MACHINE[0]: "8 shards",
}  # fmt: skip


def run_rows(runs: Iterable[Run], stored: bool) -> Iterator[tuple[list[str], float]]:
    """Yield the row of each run, and its difference in percent; measures what is missing unless `stored`."""
    for run in runs:
        if stored and not (RESULTS / f"{run.name}.json").is_file():
            continue
        found = measured(run)
        estimate, checkpointing = predicted(run, found["longest"])
        yield _row(
            [run.model, _method(run.overrides), str(run.ranks), f"{run.documents} x {run.length:,}"],
            estimate.needed(checkpointing), found["peak"], 2,
        )  # fmt: skip


def case_rows(cases: Iterable[tuple], stored: bool) -> Iterator[tuple[list[str], float]]:
    """Yield the same of each rehearsed step; one that cannot be rehearsed is reported and left out."""
    with ExitStack() as stack:
        session: RehearsalSession | None = None
        for case in cases:
            name, overrides, ranks, tokens, count, checkpointing = case
            words = [
                f"model.path={_model_folder(name)}", *overrides,
                f"model.enable_gradient_checkpointing={str(checkpointing).lower()}",
            ]  # fmt: skip
            result = RESULTS / f"{hashlib.blake2b(repr(case).encode(), digest_size=6).hexdigest()}.json"
            if stored and not result.is_file():
                continue
            if not result.is_file():
                session = session or stack.enter_context(RehearsalSession())
                try:
                    step = session.run(Case(words, ranks, tokens, count))
                except RehearsalFailed as error:
                    print(f"{name}, {_method(overrides)}, {ranks} GPU(s): not rehearsed: {error}", file=sys.stderr)
                    continue
                result.write_text(json.dumps({"peak": step.peak, "peaks": step.peaks}))
            peak = json.loads(result.read_text())["peak"]
            texts = [name, _method(overrides), str(ranks), f"{tokens:,}", str(count), "on" if checkpointing else "off"]
            yield _row(texts, _predicted_case(words, ranks, tokens, count), peak, 1)


def _predicted_case(words: list[str], ranks: int, tokens: int, count: int) -> int:
    per_node = min(ranks, GPUS_PER_NODE)
    config = load_config(
        [
            f"trainer.nnodes={ranks // per_node}", "trainer.master_addr=node0", f"data.max_length={tokens}",
            f"data.train_batch_size={ranks * count}", "data.micro_batch_size_per_gpu=1", *words,
        ]
    )  # fmt: skip
    config = for_machine(config, Machine(per_node, 80 * GIB))
    stats = StatsOf(resolve_model(config.model, config.cache_dir(), needs_weights=False), "cuda")(config)
    estimate = estimate_run(config, stats, Workload(tokens, tokens), "cuda", 80 * GIB)
    step = replace(estimate, loading=0)  # only steps are rehearsed
    return step.needed(config.model.enable_gradient_checkpointing is True)


def _row(texts: list[str], estimate: int, peak: int, decimals: int) -> tuple[list[str], float]:
    difference = 100 * (estimate / peak - 1)
    sizes = [f"{size / GIB:.{decimals}f} GiB" for size in (estimate, peak)]
    return [*texts, *sizes, f"{difference:+.1f}%"], difference


def _method(overrides: Iterable[str]) -> str:
    return ", ".join(NAMES.get(word, word.removeprefix("fsdp.strategy=")) for word in overrides) or "full"


def _model_folder(name: str) -> Path:
    config = model_config(*MODELS[name])
    config.architectures = [f"{MODELS[name][0].removesuffix('Text')}ForCausalLM"]
    config.save_pretrained(RESULTS / name)
    return RESULTS / name


def collect(title: str, count: int, rows: Iterator[tuple[list[str], float]]) -> tuple[list[list[str]], str]:
    """Return the rows, printed as they come, and a sentence about their differences."""
    found: list[list[str]] = []
    differences: list[float] = []
    for number, (row, difference) in enumerate(rows, 1):
        found.append(row)
        differences.append(difference)
        print(f"{title} {number} of {count}:", *row, flush=True)
    inside = sum(LOWEST <= difference <= HIGHEST for difference in differences)
    missing = f" {count - len(found)} of {count} have no result." if len(found) < count else ""
    if not found:
        return found, missing.strip()
    return found, (
        f"Differences go from {min(differences):+.1f}% to {max(differences):+.1f}%; {inside} of {len(found)} are "
        f"between {LOWEST:+.0f}% and {HIGHEST:+.0f}%.{missing}"
    )


def main(args: list[str]) -> int:
    """Measure and rehearse what is missing, print the tables, and return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="cpu|gpu", help="which tables; by default both")
    parser.add_argument("--write", action="store_true", help="write them into docs/memory.md")
    parser.add_argument("--stored", action="store_true", help="only what has been measured before")
    options = parser.parse_args(args)
    if unknown := set(options.tables) - {"cpu", "gpu"}:
        parser.error(f"there are the tables cpu and gpu, and not {', '.join(sorted(unknown))}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    sections = {}
    if "gpu" not in options.tables or "cpu" in options.tables:
        fitted, judged = ([run for run in RUNS if run.is_held_out is held_out] for held_out in (False, True))
        known, of_known = collect("fitted run", len(fitted), run_rows(fitted, options.stored))
        rows, summary = collect("run", len(judged), run_rows(judged, options.stored))
        sections["memory_runs"] = (
            f"{machine()}. {len(rows)} runs that were not looked at before judge the estimate. {summary} The other "
            f"{len(known)} were seen when it was fitted. {of_known}\n\n"
            + table(["", *RUN_HEADER], [["judges", *row] for row in rows] + [["seen", *row] for row in known])
        )
    if "cpu" not in options.tables or "gpu" in options.tables:
        seen, of_seen = collect("seen case", len(CASES), case_rows(CASES, options.stored))
        rows, summary = collect("case", len(JUDGING_CASES), case_rows(JUDGING_CASES, options.stored))
        sections["memory_rehearsals"] = (
            f"{len(rows)} cases that were not looked at before judge the formula. {summary} The other {len(seen)} were "
            f"seen when it was changed. {of_seen}\n\n"
            + table(["", *CASE_HEADER], [["judges", *row] for row in rows] + [["seen", *row] for row in seen])
        )
    for name, text in sections.items():
        print(f"\n{text}")
        if options.write:
            write_section(name, text, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
