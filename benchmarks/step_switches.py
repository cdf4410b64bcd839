"""What each optimization of the training step is worth in time and memory: benchmarks/step_switches.py [OVERRIDES]

Trains SmolLM2-135M (the embedded model) on the example data. Each variant switches one optimization off, or all of
them. To measure time, the variants take turns on the same batch in one process, in another order each round; the figure
is the CPU time of the process, on a GPU the elapsed time. To measure memory, each variant runs in a separate process,
since a heap does not shrink. Writes its section of RESULTS.md.
"""

import argparse
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.one_step import OneRank
from benchmarks.results import machine, table, write_section
from sft_recipe.engine import patches
from sft_recipe.engine.attention import packed

DEFAULTS = ["data.train_files=data/example_sft.json", "data.max_length=512", "data.train_batch_size=16",
            "data.micro_batch_size_per_gpu=4"]  # fmt: skip
ATTENTION = "attention within documents (off: one mask over the pack)"
BLOCKWISE = "blockwise attention (off: SDPA per document)"
PREFIXES = "prefix sharing"
LOSS = "chunked head and loss at supervised tokens"
RECOMPUTE = "recomputed norms and MLPs"
ACCUMULATE = "gradients accumulated in place"
ADAM = "fused Adam"
UNSHARDED = "one rank without FSDP"
BASELINE, NOISE = "all on", "all on, a second time (noise)"
LAYERS = nn.Linear, nn.Embedding  # whose forwards accumulate gradients
MEMORY_STEPS = 2


class Variants:
    """One rank's engine, sharded and not, on which optimizations can be switched on and off."""

    def __init__(self, overrides: list[str]):
        self.rank = OneRank([*DEFAULTS, *overrides])
        self.batch = self.rank.batch(1)
        self.unsharded, self.sharded = self.rank.engine, None
        self.own_attention = patches.attention_implementation(self.unsharded.module.config)
        self.is_blockwise_faster = packed._is_blockwise_faster
        self.names = [ATTENTION, PREFIXES, LOSS, ADAM]
        if self.unsharded.is_unsharded():
            self.names += [BLOCKWISE, RECOMPUTE, ACCUMULATE, UNSHARDED]
        self.forwards: dict[nn.Module, Callable] = {}
        self._remember_forwards()

    def run(self, off: Sequence[str]) -> float:
        """Return the seconds of one step without the optimizations `off`: CPU time, on a GPU elapsed time."""
        if UNSHARDED in off and self.sharded is None:
            with patch.object(type(self.unsharded), "is_unsharded", return_value=False):
                self.sharded = self.rank.build()
            self._remember_forwards()
        self.rank.engine = self.sharded if UNSHARDED in off else self.unsharded
        engine = self.rank.engine
        attention = "sdpa" if ATTENTION in off else self.own_attention
        patches.set_attention_implementation(engine.module.config, attention)
        engine.shares_prefixes = PREFIXES not in off and ATTENTION not in off
        engine._returns_loss = LOSS not in off
        packed._is_blockwise_faster = (lambda *_: False) if BLOCKWISE in off else self.is_blockwise_faster
        self._use_forwards(lambda part: isinstance(part, PreTrainedModel), LOSS not in off)
        self._use_forwards(lambda part: not isinstance(part, (*LAYERS, PreTrainedModel)), RECOMPUTE not in off)
        self._use_forwards(lambda part: isinstance(part, LAYERS), ACCUMULATE not in off)
        for group in engine.optimizer.param_groups:
            group["fused"], group["foreach"] = ADAM not in off, None
        return self._timed()

    def _remember_forwards(self) -> None:
        for engine in filter(None, (self.unsharded, self.sharded)):
            for part in engine.module.modules():
                if "forward" in vars(part) and part not in self.forwards:
                    self.forwards[part] = vars(part)["forward"]

    def _use_forwards(self, chosen: Callable[[nn.Module], bool], on: bool) -> None:
        """Use the forwards that the engine gave to the modules (`on`), or those of their classes."""
        for part in self.rank.engine.module.modules():
            if part in self.forwards and chosen(part):
                if on:
                    part.forward = self.forwards[part]
                else:
                    vars(part).pop("forward", None)

    def _timed(self) -> float:
        on_gpu = self.rank.device == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        self.rank.train(self.batch)
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="step switches", help="of the section of RESULTS.md")
    parser.add_argument("--peak_memory_without", nargs="*", help=argparse.SUPPRESS)  # in a separate process
    options, overrides = parser.parse_known_args()
    variants = Variants(overrides)
    if options.peak_memory_without is not None:
        for _ in range(MEMORY_STEPS):
            variants.run(options.peak_memory_without)
        # Not getrusage, whose figure a child process inherits from its parent.
        print("peak", re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        return
    off: dict[str, list[str]] = {BASELINE: [], NOISE: [], **{f"without {name}": [name] for name in variants.names}}
    off["all off"] = variants.names
    seconds: dict[str, list[float]] = {name: [] for name in off}
    shuffled = random.Random(0)
    for turn in range(options.rounds + 1):
        for variant, names in shuffled.sample(list(off.items()), len(off)):
            spent = variants.run(names)
            if turn:  # the first warms up
                seconds[variant].append(spent)
    peaks = (
        {name: peak_memory(names, overrides) for name, names in off.items()} if variants.rank.device == "cpu" else {}
    )
    tokens, docs = variants.batch["input_ids"].values().numel(), list(variants.batch["micro_batch_docs"])
    clock = "GPU" if variants.rank.device == "cuda" else "CPU"
    rows = [
        [name, f"{statistics.median(spent):.2f}", *ratio(spent, seconds[BASELINE]), *memory(peaks, name)]
        for name, spent in seconds.items()
    ]
    header = ["variant", f"median {clock} s", "ratio", "least", "most", "peak MiB", "memory ratio"]
    command = shlex.join(["benchmarks/step_switches.py", *sys.argv[1:]])
    section = f"""## What each optimization of the step is worth: {options.name}

`{command}`; {machine()}, {torch.get_num_threads()} threads. One step of {tokens:,} tokens in micro-batches of {docs}
documents, {options.rounds} rounds. The ratio is the median, with least and most, of each round's time over that of the
same round with all on; peak memory is that of a separate process after {MEMORY_STEPS} steps.

{table(header, rows)}
"""
    print(section)
    write_section(options.name, section)
    torch.distributed.destroy_process_group()


def ratio(seconds: list[float], base: list[float]) -> list[str]:
    """Return the median, least and most of the paired ratios."""
    ratios = [own / other for own, other in zip(seconds, base, strict=True)]
    return [f"{figure:.3f}" for figure in (statistics.median(ratios), min(ratios), max(ratios))]


def memory(peaks: dict[str, int], name: str) -> list[str]:
    return [f"{peaks[name]:,}", f"{peaks[name] / peaks[BASELINE]:.3f}"] if peaks else ["", ""]


def peak_memory(off: list[str], overrides: list[str]) -> int:
    """Return the peak of resident memory, in MiB, of a process that trains without the optimizations `off`."""
    command = [sys.executable, __file__, *overrides, "--peak_memory_without", *off]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.rsplit("peak", 1)[1]) // 1024


if __name__ == "__main__":
    main()
