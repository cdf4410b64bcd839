"""Estimates the peak memory of a rank's device and decides whether activations are recomputed (checkpointing).

The activations that autograd saves for a decoder layer are counted as in Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, section 4, for current layers: no tokens x tokens scores, RMSNorm, grouped-query
attention, a gated MLP.
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

USABLE = 0.9  # fraction of a device's memory: the runtime, buffers of collectives and fragmentation take the rest
GIB = 2**30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
ADVICE = (
    "In this order: a smaller MICRO_BATCH_SIZE or MAX_LENGTH, --use_lora, more GPUs (N_GPUS), fsdp=fsdp_offload; "
    "see docs/memory.md"
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank's device at the peak of a step.

    `weights`, `unsharded` (gathered parameters), `gradients` and `optimizer` are static; a micro-batch adds
    `activations`, or `recomputed` with activation checkpointing. `device` is the memory of the device. Parameters and
    optimizer state that are offloaded between steps count, since they are on the device during a step.
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
        """Return the bytes that do not depend on the micro-batch."""
        return self.weights + self.unsharded + self.gradients + self.optimizer

    def needed(self, checkpointing: bool) -> int:
        """Return the bytes at the peak, with activation checkpointing or without."""
        return self.static + (self.recomputed if checkpointing else self.activations)

    def fits(self, checkpointing: bool) -> bool:
        """Return whether the peak fits the usable part of the device's memory."""
        return self.needed(checkpointing) <= USABLE * self.device

    def describe(self, checkpointing: bool) -> str:
        """Return the line for the banner: `needs about 5.0 of 24.0 GiB, 12.0 without`."""
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
    """Estimate the memory of one rank.

    The model has `total` parameters, `trainable` ones among them, and computes in numbers of `width` bytes; `device` is
    the memory of a device in bytes. `on_cpu`: norms and MLPs save only their inputs, and a single rank holds an
    unsharded model. `longest` is the number of tokens of the longest example, `logits` the largest number of logits
    that exist at the same time.
    """
    fsdp, data = config.fsdp, config.data
    shards = fsdp.fsdp_size if fsdp.fsdp_size > 0 else config.trainer.world_size
    master = {"fp32": FP32, "bf16": 2}[fsdp.model_dtype]
    ranks = config.trainer.world_size // fsdp.ulysses_sequence_parallel_size
    step_tokens = data.train_batch_size * longest
    tokens = math.ceil(min(data.token_budget, step_tokens) / fsdp.ulysses_sequence_parallel_size)
    # A resharding model has two layers gathered at the same time, and embeddings and head all the time.
    embeddings = 2 * dims.vocabulary * dims.hidden
    resharded = min(total, embeddings + 2 * total // dims.layers)
    accumulates = step_tokens > ranks * data.token_budget and fsdp.use_no_sync_for_gradient_accumulation
    is_unsharded = on_cpu and config.trainer.world_size == 1
    layer, head = (
        dims.activation_bytes_per_token(width, on_cpu, is_unsharded),
        dims.head_bytes(tokens, width, on_cpu, logits),
    )
    on_device = on_cpu or not fsdp.offload_policy
    unsharded = width * (resharded if reshards_after_forward(config, on_cpu) else total)
    # Until the last micro-batch each rank holds all of them, in fp32.
    gradients = FP32 * trainable if accumulates else on_device * master * trainable // shards
    if is_unsharded:
        unsharded, gradients = 0 if width == master else width * trainable, FP32 * trainable
    return MemoryEstimate(
        weights=on_device * master * total // shards,
        unsharded=unsharded,
        gradients=gradients,
        optimizer=on_device * 2 * master * trainable // shards,
        # One layer more than the model has: the gradients in flight.
        activations=tokens * layer * (dims.layers + 1) + head,
        recomputed=tokens * (layer * 2 + width * dims.hidden * dims.layers) + head,
        device=device,
    )


def resolve_activation_checkpointing(
    config: Config, stats: ModelStats, longest: int, device: str, logits_chunk: int, say: Callable[[str], None]
) -> tuple[Config, MemoryEstimate | None]:
    """Decide `model.enable_gradient_checkpointing=auto`: on only where the peak does not fit without it. Collective.

    Returns the configuration with the decision, and the estimate. The decision depends on the memory that devices have,
    not on what is free, so that a resumed run decides equally, and on the smallest device of all ranks. Returns no
    estimate and decides nothing for unknown dimensions and for Megatron.
    Raises PreflightError where weights and optimizer state alone exceed the device.
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
    description = f"a rank {estimate.describe(chosen)}. {ADVICE}"
    if estimate.weights + estimate.optimizer > estimate.device:
        raise PreflightError(f"weights and optimizer state exceed device memory: {description}")
    if not estimate.fits(chosen):
        say(f"Memory may run out: {description}.")
    return config, estimate


def device_memory(device: str) -> int:
    """Return the bytes that this rank may use: of its GPU, or its part of the memory of the machine or container."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    found = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    limits = [int(text) for text in found if text.isdigit()]
    return min([psutil.virtual_memory().total, *limits]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
