"""Shows where the time and the memory of a training step go: benchmarks/profile_step.py [Hydra overrides]

Trains SmolLM2-135M (the embedded model) on the example data, unless overrides such as model.path=... or lora=r8 change
that. Times are of the operators themselves, without the operators that they call; on a GPU, of its kernels.
"""

import resource
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.one_step import OneRank
from benchmarks.results import machine, table

DEFAULTS = ["data.train_files=data/example_sft.json", "data.max_length=512", "data.train_batch_size=4",
            "data.micro_batch_size_per_gpu=4"]  # fmt: skip
# Parts of names of operators. An operator is of an outer kind if its name, or that of any operator that calls it,
# contains such a part; the head is recognized by its inputs' shapes; otherwise the innermost name that matches decides.
OUTER_KINDS = {
    "optimizer": ("optimizer.step", "_fused_adam", "_foreach", "clip_grad", "linalg_vector_norm"),
    "gathering and casting weights": ("fsdp::",),
}
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "varlen_attn", "softmax"),
    "matrix products": ("mm", "linear", "matmul", "gemm", "mkldnn"),
    "collectives": ("c10d", "gloo", "nccl"),
    "casts and copies": ("copy", "clone", "cat", "fill_", "zero_"),
    "norms and elementwise": ("mul", "add", "silu", "rsqrt", "pow", "mean", "neg", "sub", "div", "sum", "sigmoid"),
}
HEAD = "head and loss"
OTHER = "other"


def main() -> None:
    rank = OneRank([*DEFAULTS, *sys.argv[1:]])
    vocabulary = rank.engine.module.config.vocab_size
    rank.train(rank.batch(0))  # the first step allocates optimizer state and buffers
    batch = rank.batch(1)
    on_gpu = rank.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        rank.train(batch)
    events = list(profiler.events())
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        kind = kind_of_event(event, vocabulary)
        spent[kind] += getattr(event, attribute) / 1e3
        calls[kind] += 1
    total = sum(spent.values())
    rows = [
        [kind, f"{spent[kind]:,.0f}", f"{100 * spent[kind] / total:.1f}", f"{calls[kind]:,}"]
        for kind in sorted(spent, key=spent.__getitem__, reverse=True)
    ]
    tokens, supervised = (int(batch[name].values().size(0)) for name in ("input_ids", "loss_mask"))
    supervised = int(batch["loss_mask"].values().sum())
    docs = list(batch["micro_batch_docs"])
    print(f"\n{machine()}, {torch.get_num_threads()} threads\n{' '.join(sys.argv[1:]) or 'defaults'}")
    print(f"{tokens} tokens, {supervised} supervised, micro-batches of {docs} documents\n")
    print(table(["kind", "ms", "percent", "operators"], [*rows, ["all", f"{total:,.0f}", "100.0", f"{len(events):,}"]]))
    print()
    print(table(["memory", "MB"], [[name, f"{size / 2**20:,.0f}"] for name, size in memory(rank, profiler).items()]))
    torch.distributed.destroy_process_group()


def kind_of_event(event: Any, vocabulary: int) -> str:
    """Return the kind of an operator, from its name and those of its callers."""
    names, caller = [], event
    while caller is not None:
        names.append(caller.name.lower())
        caller = caller.cpu_parent
    for kind, parts in OUTER_KINDS.items():
        if any(part in name for name in names for part in parts):
            return kind
    shapes = event.input_shapes or (event.cpu_parent.input_shapes if event.cpu_parent else [])
    has_vocabulary = any(vocabulary in shape for shape in shapes if isinstance(shape, list))
    if (has_vocabulary and not any("embedding" in name for name in names)) or "crossentropy" in names[-1]:
        return HEAD
    for name in names:
        for kind, parts in KINDS.items():
            if any(part in name for part in parts):
                return kind
    return OTHER


def memory(rank: OneRank, profiler: profile) -> dict[str, int]:
    """Return the bytes that stay allocated between steps, the most that a step adds, and the peak of the process."""

    def size(tensors: Any) -> int:
        local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in local)

    state = (part for parts in rank.engine.optimizer.state.values() for part in parts.values())
    parameters = list(rank.engine.module.parameters())
    sizes = {
        "weights": size(parameters),
        "gradients, unsharded": size(part for part in parameters if part.requires_grad),
        "optimizer state": size(part for part in state if isinstance(part, torch.Tensor)),
        "most allocated during the step, above its start": _peak(profiler),
    }
    if rank.device == "cuda":
        sizes["peak on the GPU"] = torch.cuda.max_memory_allocated()
    sizes["peak of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sizes


def _peak(profiler: profile) -> int:
    use, most = 0, 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda change: change.start_ns()):
        use += change.nbytes()
        most = max(most, use)
    return most


if __name__ == "__main__":
    main()
