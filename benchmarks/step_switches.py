"""What each optimisation of the training step is worth: benchmarks/step_switches.py [Hydra overrides]

SmolLM2-135M (the embedded model) on the example data, in this process. Each variant switches one thing off, or all; two
have transformers' layers, compiled, which no run has. They take turns on the same batch, in another order each round.
What counts is the CPU time of the process (with OMP_NUM_THREADS=1 no thread waits for another in it), on a GPU time.
Writes its section of RESULTS.md.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.one_step import OneRank
from benchmarks.results import machine, table, write_section

DEFAULTS = ["data.train_files=data/example_sft.json", "data.max_length=512", "data.train_batch_size=16",
            "data.micro_batch_size_per_gpu=4"]  # fmt: skip
ATTENTION = "attention of each document to itself, not under a mask"
SHARED = "shared beginnings once (needs the former)"
LOSS = "head and loss in parts, at supervised tokens"
LEAN = "norms and gated products keep their inputs only, results are made again"
SUMS = "linear maps and embeddings add to the sums of gradients"
ADAM = "fused Adam"
WHOLE = "one rank holds the whole model, without FSDP"
PREDICTED = {  # for the defaults, on two cores that compute in fp32; written down before it was measured
    ATTENTION: ("1.3", "the scores of whole packs, 0.6 TFLOP more of 1.6"),
    SHARED: ("1.1", "a tenth more tokens in all products"),
    LOSS: ("1.06", "the head at prompts too, and logits several times through memory"),
    LEAN: ("", "done for the memory; 1.00 was predicted before results were made again"),
    SUMS: ("", "not predicted: 1.03 and 1.04 in two series of pairs when it was made"),
    ADAM: ("1.03", "ten passes over weights, gradients and moments for one"),
    WHOLE: ("1.03", "weights gathered, gradients flattened: 2 GB of copies"),
}
COMPILED = "torch.compile of the layers"  # on: not compiled
AGAIN = "all on, a second time: the noise"
MAPS = nn.Linear, nn.Embedding
OTHERS = *MAPS, PreTrainedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options, overrides = parser.parse_known_args()
    rank = OneRank([*DEFAULTS, *overrides])
    engines = {True: rank.engine}  # by whether it holds the whole model
    if rank.engine.is_unsharded():
        with patch.object(type(rank.engine), "is_unsharded", return_value=False):
            engines[False] = rank.build()
    models = [one.module for one in engines.values()]
    changed = {part: vars(part)["forward"] for one in models for part in one.modules() if "forward" in vars(part)}
    ours = rank.engine.module.config._attn_implementation
    switches: dict[str, Callable[[OneRank, bool], None]] = {
        ATTENTION: lambda rank, on: use_attention(rank, ours if on else "sdpa"),
        SHARED: lambda rank, on: share(rank, on and rank.engine.module.config._attn_implementation == ours),
        LOSS: lambda rank, on: use_loss(rank, changed, on),
        LEAN: lambda rank, on: use_forwards(rank, changed, lambda part: not isinstance(part, OTHERS), on),
        SUMS: lambda rank, on: use_forwards(rank, changed, lambda part: isinstance(part, MAPS), on),
        ADAM: fuse_adam,
    }
    names = [*switches, *([WHOLE] if False in engines else [])]
    variants = {"all on": [], AGAIN: [], **{f"without: {name}": [name] for name in names}, "all off": names}
    predicted = {f"without: {name}": PREDICTED[name] for name in names}
    switches[COMPILED] = lambda rank, on: torch.compiler.set_stance("force_eager" if on else "default")
    for layer in rank.engine.module.get_decoder().layers:
        layer.compile(dynamic=True)
    variants["transformers' layers, compiled"] = [LEAN, SUMS, COMPILED]
    variants["the same, and attention under a mask"] = [ATTENTION, SHARED, LEAN, SUMS, COMPILED]
    batch = rank.batch(1)
    clock = "GPU" if rank.device == "cuda" else "CPU"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffled = random.Random(0)
    for turn in range(options.rounds + 1):
        for variant, off in shuffled.sample(list(variants.items()), len(variants)):
            rank.engine = engines[WHOLE not in off]
            for name, switch in switches.items():
                switch(rank, name not in off)
            spent = timed(rank, batch)
            if turn:  # the first warms up
                seconds[variant].append(spent)
            elif COMPILED in off:
                predicted[variant] = "", f"no run has it; {spent:.0f} {clock} s for the step that compiles"
    rows = [
        [name, f"{statistics.median(of_one):.2f}", *ratio(of_one, seconds["all on"]), *predicted.get(name, ("", ""))]
        for name, of_one in seconds.items()
    ]
    tokens, docs = batch["input_ids"].values().numel(), list(batch["micro_batch_docs"])
    section = f"""## What each optimisation of the step is worth

`benchmarks/step_switches.py {" ".join(sys.argv[1:])}`; {machine()}, {torch.get_num_threads()} threads.
One step of {tokens:,} tokens in micro-batches of {docs} documents, {options.rounds} rounds.
The ratio is the median, with least and most, of each round's time over that of the same round with all on. Predicted
was, before the first run of this table, what two cores that compute in fp32 would show; all but the last two are kept.

{table(["variant", f"median {clock} s", "ratio", "least", "most", "predicted", "because of"], rows)}
"""
    print(section)
    write_section("step switches", section)
    torch.distributed.destroy_process_group()


def ratio(seconds: list[float], base: list[float]) -> list[str]:
    """Median, least and most of the paired ratios."""
    ratios = [one / other for one, other in zip(seconds, base, strict=True)]
    return [f"{figure:.3f}" for figure in (statistics.median(ratios), min(ratios), max(ratios))]


def timed(rank: OneRank, batch: torch.Tensor) -> float:
    on_gpu = rank.device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    rank.train(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def use_attention(rank: OneRank, name: str) -> None:
    rank.engine.module.config._attn_implementation = name


def share(rank: OneRank, shares: bool) -> None:
    rank.engine.shares_prefixes = shares


def use_loss(rank: OneRank, changed: dict[nn.Module, Callable], on: bool) -> None:
    rank.engine._returns_loss = on
    use_forwards(rank, changed, lambda part: isinstance(part, PreTrainedModel), on)


def use_forwards(rank: OneRank, changed: dict[nn.Module, Callable], of: Callable[[nn.Module], bool], on: bool) -> None:
    """The forwards that some modules were given, or those of their classes."""
    for part in rank.engine.module.modules():
        if part in changed and of(part):
            if on:
                part.forward = changed[part]
            else:
                vars(part).pop("forward", None)


def fuse_adam(rank: OneRank, fused: bool) -> None:
    for group in rank.engine.optimizer.param_groups:
        group["fused"], group["foreach"] = fused, None


if __name__ == "__main__":
    main()
