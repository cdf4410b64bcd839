"""How much memory a rank's device needs, from the numbers of a model: whether activations must be recomputed.

What autograd keeps of a decoder layer is counted as in Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198,
section 4, for today's layers: no scores of tokens x tokens, RMSNorm, grouped key and value heads, a gated MLP.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from sft_recipe.config.auto import compute_dtype, reshards_after_forward, uses_gradient_checkpointing
from sft_recipe.config.schema import Config
from sft_recipe.errors import PreflightError
from sft_recipe.models.dims import FP32, ModelDims
from sft_recipe.models.stats import ModelStats

USABLE = 0.9  # of a device's memory: the rest goes to its runtime, to buffers of collectives, and to gaps
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank's device at the peak of a step: what is held all the time, and what a micro-batch adds.

    Parameters and optimiser state that are offloaded between steps are on the device during one, so that they count.
    """

    weights: int
    unsharded: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    device: int

    @property
    def static(self) -> int:
        return self.weights + self.unsharded + self.gradients + self.optimizer

    def needed(self, checkpointing: bool) -> int:
        """With gradient checkpointing or without."""
        return self.static + (self.recomputed if checkpointing else self.activations)

    def fits(self, checkpointing: bool) -> bool:
        return self.needed(checkpointing) <= USABLE * self.device

    def describe(self, checkpointing: bool) -> str:
        """For the banner."""
        without = f", {_gib(self.activations + self.static)} without" if checkpointing else ""
        return f"needs about {_gib(self.needed(checkpointing))} of {_gib(self.device)} GiB{without}"


def estimate_memory(
    config: Config,
    dims: ModelDims,
    total: int,
    trainable: int,
    width: int,
    on_cpu: bool,
    longest: int,
    logits: int,
    device: int,
) -> MemoryEstimate:
    """For a model of `total` parameters that computes in numbers of `width` bytes, on devices of `device` bytes.

    `on_cpu` norms and MLPs save their inputs only, and a single rank holds an unsharded model; `longest` is the longest
    example's number of tokens, `logits` the largest number of logits that exist at the same time.
    """
    fsdp, data = config.fsdp, config.data
    shards = fsdp.fsdp_size if fsdp.fsdp_size > 0 else config.trainer.world_size
    master = {"fp32": FP32, "bf16": 2}[fsdp.model_dtype]
    ranks = config.trainer.world_size // fsdp.ulysses_sequence_parallel_size
    of_step = data.train_batch_size * longest
    tokens = math.ceil(min(data.token_budget, of_step) / fsdp.ulysses_sequence_parallel_size)
    # Of a model in parts, two layers are gathered at once, and what is outside of layers all the time.
    outside = 2 * dims.vocabulary * dims.hidden
    in_parts = min(total, outside + 2 * total // dims.layers)
    accumulates = of_step > ranks * data.token_budget and fsdp.use_no_sync_for_gradient_accumulation
    is_whole = on_cpu and config.trainer.world_size == 1
    layer, ends = (
        dims.activation_bytes_per_token(width, on_cpu, is_whole),
        dims.head_bytes(tokens, width, on_cpu, logits),
    )
    on_device = on_cpu or not fsdp.offload_policy
    unsharded = width * (in_parts if reshards_after_forward(config, on_cpu) else total)
    # Until the last micro-batch they are whole, in fp32, on each rank.
    gradients = FP32 * trainable if accumulates else on_device * master * trainable // shards
    if is_whole:
        unsharded, gradients = 0 if width == master else width * trainable, FP32 * trainable
    return MemoryEstimate(
        weights=on_device * master * total // shards,
        unsharded=unsharded,
        gradients=gradients,
        optimizer=on_device * 2 * master * trainable // shards,
        # One layer more than there are: its gradients, in flight.
        activations=tokens * layer * (dims.layers + 1) + ends,
        recomputed=tokens * (layer * 2 + width * dims.hidden * dims.layers) + ends,
        device=device,
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
ADVICE = (
    "In this order: a smaller MICRO_BATCH_SIZE or MAX_LENGTH, --use_lora, more GPUs (N_GPUS), fsdp=fsdp2_offload; "
    "see README.md, Out of memory"
)


def resolve_activation_checkpointing(
    config: Config, stats: ModelStats, longest: int, device: str, logits_chunk: int, say: Callable[[str], None]
) -> tuple[Config, MemoryEstimate | None]:
    """Collective. The configuration with `auto` decided: on only where memory would not do without.

    It goes by what devices have, not by what is free, so that a resumed run decides likewise; and all ranks by the
    smallest device. No plan, and no decision, where the model's sizes are not known or Megatron trains it.
    Raises PreflightError where not even weights and optimiser state fit.
    """
    if stats.dims is None or config.fsdp.strategy == "megatron":
        return config, None
    width = {"bf16": 2, "fp32": 4}[compute_dtype(config.fsdp, device)]
    memory = torch.tensor(device_memory(device))
    dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    sizes = stats.dims, stats.total, stats.trainable
    estimate = estimate_memory(config, *sizes, width, device == "cpu", longest, logits_chunk, int(memory))
    if config.model.enable_gradient_checkpointing == "auto":
        model = config.model.model_copy(
            update={"enable_gradient_checkpointing": not estimate.fits(checkpointing=False)}
        )
        config = config.model_copy(update={"model": model})
    chosen = uses_gradient_checkpointing(config, device)
    describe = f"a rank {estimate.describe(chosen)}. {ADVICE}"
    if estimate.weights + estimate.optimizer > estimate.device:
        raise PreflightError(f"not even weights and optimiser state fit: {describe}")
    if not estimate.fits(chosen):
        say(f"Memory may run out: {describe}.")
    return config, estimate


def device_memory(device: str) -> int:
    """Bytes that this rank may use, in all: of its GPU, or its share of this machine's or container's memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    found = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    limits = [int(text) for text in found if text.isdigit()]
    return min([psutil.virtual_memory().total, *limits]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
