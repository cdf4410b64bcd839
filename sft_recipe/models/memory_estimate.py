"""Estimates the peak memory of a rank's device and decides whether activations are recomputed (checkpointing).

The activations that autograd saves for a decoder layer are counted as in Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, section 4, for current layers: no tokens x tokens scores, RMSNorm, grouped-query
attention, a gated MLP.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from sft_recipe.config.auto import compute_dtype, reshards_after_forward, uses_gradient_checkpointing
from sft_recipe.config.optimizer import optimizer_state_size
from sft_recipe.config.schema import Config
from sft_recipe.distributed.host_memory import total_memory
from sft_recipe.errors import PreflightError
from sft_recipe.models.dims import FP32, LOGITS_CHUNK, ModelDims
from sft_recipe.models.fitting import changed, fitting_options
from sft_recipe.models.quantization import CONSTANTS, PACKED
from sft_recipe.models.stats import ModelStats
from sft_recipe.models.workload import Workload, data_ranks

USABLE = 0.9  # fraction of a device's memory: the runtime, buffers of collectives and fragmentation take the rest
GIB = 2**30
PROGRAM = 475 * 2**20  # bytes of a CPU rank's libraries, beside their files
GAPS = 0.35  # of the memory of a CPU rank's activations is free between them
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ADVICE = (
    "In this order: a smaller MICRO_BATCH_SIZE or MAX_LENGTH, --use_lora, --use_qlora, more GPUs (N_GPUS), "
    "fsdp=fsdp_offload; see docs/memory.md"
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank's device at the peak of a run.

    `weights`, `unsharded` (gathered parameters), `gradients` and `optimizer` are static; a micro-batch adds
    `activations`, or `recomputed` with activation checkpointing. `device` is the memory of the device, `loading` what a
    model needs there before the first step, where that may be more. Parameters and optimizer state that are offloaded
    between steps count, since they are on the device during a step.

    A CPU rank also has the `program` itself, the `export` of the model that rank 0 writes, and `copies` of the state
    for saving while training continues; where those do not fit there are none, and saving blocks training. Weights that
    it reads from their file as they are, `mapped`, must fit as well; but they are not needed, since the kernel may drop
    and read them again.
    """

    weights: int
    unsharded: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    device: int
    loading: int = 0
    program: int = 0
    export: int = 0
    copies: int = 0
    mapped: int = 0
    saves_before_end: bool = True

    def needed(self, checkpointing: bool) -> int:
        """Return the bytes at the peak, with activation checkpointing or without."""
        return max(sum(self._peak(checkpointing).values()), self.loading)

    def _peak(self, checkpointing: bool) -> dict[str, int]:
        """The bytes of each part at the peak; a save of a run that `saves_before_end` coincides with activations."""
        static = {
            "weights": self.weights, "gathered weights": self.unsharded, "gradients": self.gradients,
            "optimizer": self.optimizer, "program": self.program,
        }  # fmt: skip
        activations = {"activations": self.recomputed if checkpointing else self.activations}
        saved = {"export": self.export}
        beside = static | saved | (activations if self.saves_before_end else {})
        if sum(beside.values()) + self.copies + self.mapped <= USABLE * self.device:
            saved["copies to save"] = self.copies
        if self.saves_before_end:
            return static | activations | saved
        return static | max(activations, saved, key=lambda part: sum(part.values()))

    def fits(self, checkpointing: bool) -> bool:
        """Return whether the peak fits the usable part of the device's memory."""
        return self.needed(checkpointing) + self.mapped <= USABLE * self.device

    def describe(self, checkpointing: bool) -> str:
        """Return the line for the banner: `needs about 5.0 of 24.0 GiB, 12.0 without`."""
        without = f", {_gib(self.needed(False))} without" if checkpointing else ""
        return f"needs about {_gib(self.needed(checkpointing))} of {_gib(self.device)} GiB{without}"

    def parts(self, checkpointing: bool) -> dict[str, str]:
        """Return what the peak consists of, in GiB: `{"weights": "1.0", "gradients": "0.5"}`."""
        parts = self._peak(checkpointing) | {"and in mapped files": self.mapped}
        return {name: _gib(size) for name, size in parts.items() if size}


def estimate_memory(
    config: Config,
    dims: ModelDims,
    total: int,
    trainable: int,
    width: int,
    on_cpu: bool,
    workload: Workload,
    logits: int,
    device: int,
) -> MemoryEstimate:
    """Estimate the memory of one rank.

    The model has `total` parameters, `trainable` ones among them, and computes in numbers of `width` bytes; `device` is
    the memory of a device in bytes. `on_cpu`: norms and MLPs save only their inputs, and a single rank holds an
    unsharded model. `logits` is the largest number of logits that exist at the same time.
    """
    fsdp, data = config.fsdp, config.data
    shards = fsdp.fsdp_size if fsdp.fsdp_size > 0 else config.trainer.world_size
    master = {"fp32": FP32, "bf16": 2}[fsdp.model_dtype]
    tokens = math.ceil(_micro_batch_tokens(config, workload) / fsdp.ulysses_sequence_parallel_size)
    is_fsdp1 = not on_cpu and fsdp.strategy == "fsdp"
    resharded = _gathered(dims, total, not config.lora.enabled, is_fsdp1)
    has_several = data.train_batch_size * workload.mean > data_ranks(config) * data.token_budget
    accumulates = has_several and fsdp.use_no_sync_for_gradient_accumulation
    is_unsharded = on_cpu and config.trainer.world_size == 1
    frozen = master  # bytes of a weight that is not trained
    if config.lora.enabled:  # base weights are in the compute dtype, and FSDP1 on one GPU uses them as they are
        frozen = width
        resharded = trainable if shards == 1 and is_fsdp1 else resharded
    on_device = on_cpu or not fsdp.offload_policy
    frees = reshards_after_forward(config, on_cpu) or shards == 1 and is_fsdp1
    unsharded = width * (resharded if frees else total)
    # Until the last micro-batch each rank holds all of them: FSDP1 in the compute dtype, else in fp32.
    gradients = (width if is_fsdp1 else FP32) * trainable if accumulates else on_device * master * trainable // shards
    if is_unsharded:
        copied = trainable if config.lora.enabled else total  # weights under adapters are converted for good
        unsharded, gradients = 0 if width == master else width * copied, FP32 * trainable
    layer = tokens * dims.activation_bytes_per_token(width, on_cpu, is_unsharded)
    layer += tokens * width * dims.copied_inputs * (config.lora.enabled and is_fsdp1 and width != FP32)
    layers = layer * (dims.layers + (on_cpu and config.lora.enabled))  # and what adapters compute before the sum
    has_product = not config.lora.enabled and not (is_unsharded and width == FP32)  # for the head's gradient
    head = dims.head_bytes(tokens, width, on_cpu, logits, has_product)
    # Gradients of a GPU that are not accumulated grow while activations go: only the larger of both counts.
    grown = 0 if on_cpu or accumulates else gradients
    last = 0 if config.lora.enabled else _last_gradients(dims, total, width, unsharded, shards, is_fsdp1)
    backward = max(2 * layer, last)
    inputs = 0 if config.model.enable_activation_offload and not on_cpu else tokens * width * dims.hidden * dims.layers
    return MemoryEstimate(
        weights=on_device * (master * trainable + frozen * (total - trainable)) // shards,
        unsharded=unsharded,
        gradients=gradients,
        optimizer=on_device * int(optimizer_state_size(config.optim) * master * trainable) // shards,
        activations=max(layers + head - grown, 0 if on_cpu else backward),
        recomputed=2 * layer + inputs + head if on_cpu else max(inputs + max(head, 2 * layer) - grown, backward),
        device=device,
    )


def _micro_batch_tokens(config: Config, workload: Workload) -> int:
    data = config.data
    return workload.micro_batch(data.train_batch_size, data_ranks(config), data.token_budget)


def _gathered(dims: ModelDims, total: int, is_trained: bool, is_fsdp1: bool) -> int:
    """The largest number of weights that a resharding model has gathered, with the gradients of a layer as weights.

    They are two layers, and embeddings and head, which stay; FSDP2 frees embeddings that are not the head.
    """
    root = dims.outside_layers(total) if is_fsdp1 else dims.vocabulary * dims.hidden
    return min(total, root + (2 + is_trained) * total // dims.layers)


def _last_gradients(dims: ModelDims, total: int, width: int, unsharded: int, shards: int, is_fsdp1: bool) -> int:
    """The bytes that the end of the backward pass needs more than `unsharded` weights.

    They are the gradients of embeddings and head, their copies in fp32 to reduce, and those of a layer. The weights are
    freed before, but those of embeddings and head on a single GPU. FSDP2 reduces embeddings that are not the head by
    themselves, while the weights of both and the gradient of the head are there.
    """
    outside, one = dims.outside_layers(total), dims.vocabulary * dims.hidden
    if outside > 1.5 * one and not is_fsdp1:  # there are two such matrices
        return (4 * width + FP32) * one - unsharded
    freed = unsharded - (width * outside if shards == 1 else 0)
    return (FP32 + width) * outside + FP32 * (total - outside) // dims.layers - freed


def estimate_run(config: Config, stats: ModelStats, workload: Workload, device: str, memory: int) -> MemoryEstimate:
    """Estimate the memory of a rank on "cuda" or "cpu", with `memory` bytes, for a model with known dimensions."""
    assert stats.dims is not None
    dtype = DTYPES[compute_dtype(config.fsdp, device)]
    width = dtype.itemsize
    data, sizes = config.data, (stats.dims, stats.total, stats.trainable)
    limit = data.token_budget // data.micro_batch_size_per_gpu
    workload = workload.limited(limit)
    found = estimate_memory(config, *sizes, width, device == "cpu", workload, LOGITS_CHUNK[device], memory)
    if config.lora.quantize:
        found = with_quantized(found, config, stats, width, device == "cpu")
    if device == "cuda":
        return found
    more = _in_flight(config, stats, width, _micro_batch_tokens(config, workload))
    mapped = _mapped(config, stats, dtype)
    return replace(
        found,
        weights=found.weights - mapped,
        mapped=mapped,
        activations=int((1 + GAPS) * found.activations) + more,
        recomputed=int((1 + GAPS) * found.recomputed) + more,
        program=PROGRAM,
        saves_before_end=workload.saves_before_end,
        **_saved(config, stats, found, width),
    )


def with_quantized(
    estimate: MemoryEstimate, config: Config, stats: ModelStats, width: int, on_cpu: bool
) -> MemoryEstimate:
    """Return the estimate of a LoRA run with `stats.quantized` weights in 4 bits instead of numbers of `width` bytes.

    A weight takes 0.5 bytes, and 1/64 + 4 / (64 * 256) for its scales (section 3 of QLoRA, see quantization.py), which
    every rank keeps. Each layer dequantizes one matrix at a time. A rank quantizes the complete model before its part.
    """
    assert stats.dims is not None
    fsdp, quantized, dims = config.fsdp, stats.quantized, stats.dims
    shards = fsdp.fsdp_size if fsdp.fsdp_size > 0 else config.trainer.world_size
    gathered = 2 * quantized // dims.layers if reshards_after_forward(config, on_cpu) else quantized
    is_unsharded = on_cpu and config.trainer.world_size == 1
    saved, scales = width - PACKED, math.ceil(CONSTANTS * quantized)
    matrix = dims.hidden * max(dims.intermediate // max(dims.experts, 1), dims.query)
    kept = 0 if fsdp.offload_policy and not on_cpu else int(saved * quantized) // shards
    rest = stats.total - stats.trainable - quantized
    return replace(
        estimate,
        weights=estimate.weights - kept + scales,
        unsharded=estimate.unsharded - (0 if is_unsharded else int(saved * gathered)) + width * matrix,
        loading=int(PACKED * quantized) + scales + width * rest + FP32 * stats.trainable,
    )


def _mapped(config: Config, stats: ModelStats, dtype: torch.dtype) -> int:
    """The bytes of weights that a single CPU rank does not change, in the dtype of their file: it maps the file."""
    is_single = config.trainer.world_size == 1 and config.lora.enabled and not config.lora.quantize
    return dtype.itemsize * (stats.total - stats.trainable) if is_single and stats.stored == dtype else 0


def _in_flight(config: Config, stats: ModelStats, width: int, tokens: int) -> int:
    """The bytes by which what CPU ranks exchange at a time exceeds logits and the head's gradient; it has their place.

    These are the largest tensors, beside those of the heap. Embeddings and head belong to no layer: they are gathered
    at once, with a copy in one piece, and their gradients are added up at once, with a copy and the sum.
    """
    assert stats.dims is not None
    ranks, dims = config.trainer.world_size, stats.dims
    if ranks == 1:
        return 0
    outside = dims.outside_layers(stats.total)
    logits = width * min(tokens * dims.vocabulary, 2 * LOGITS_CHUNK["cpu"])
    if config.lora.enabled:
        return max(0, width * outside - logits)
    return max(0, FP32 * (outside + outside // ranks) - logits - width * dims.vocabulary * dims.hidden)


def _saved(config: Config, stats: ModelStats, estimate: MemoryEstimate, width: int) -> dict[str, int]:
    """The bytes of a save on a CPU, on rank 0: of the exported model, and of the copies of this rank's state.

    Adapters are next to nothing. They are merged in fp32, rounded, and loaded again to be compared; the heap keeps the
    places of all three.
    """
    lora, weights, export = config.lora, estimate.weights, max(width, stats.stored.itemsize) * stats.total
    if lora.enabled:
        weights, export = FP32 * stats.trainable, (2 * FP32 + width) * stats.total if lora.merge else 0
    return {"export": export} | ({"copies": weights + estimate.optimizer} if config.trainer.async_save else {})


def options_that_fit(
    config: Config, stats_of: Callable[[Config], ModelStats], workload: Workload, device: str, memory: int
) -> list[str]:
    """Return settings with which a rank's peak fits `memory` bytes, as flags and overrides; see fitting.py."""

    def fits(other: Config) -> bool:
        checkpointing = other.model.enable_gradient_checkpointing is not False
        return estimate_run(other, stats_of(other), workload, device, memory).fits(checkpointing)

    recomputing = changed(config, {"model.enable_gradient_checkpointing": True})
    if config.model.enable_gradient_checkpointing is False and fits(recomputing):
        return ["model.enable_gradient_checkpointing=true"]
    return fitting_options(config, fits, on_gpus=device == "cuda")


def resolve_activation_checkpointing(
    config: Config,
    stats_of: Callable[[Config], ModelStats],
    workload: Workload,
    device: str,
    say: Callable[[str], None],
) -> tuple[Config, MemoryEstimate | None]:
    """Decide `model.enable_gradient_checkpointing=auto`: on only where the peak does not fit without it. Collective.

    Returns the configuration with the decision, and the estimate. The decision depends on the memory that devices have,
    not on what is free, so that a resumed run decides equally, and on the smallest device of all ranks. Returns no
    estimate and decides nothing for unknown dimensions and for Megatron.
    Raises PreflightError where weights and optimizer state alone exceed the device. Messages name what would fit.
    """
    stats = stats_of(config)
    if stats.dims is None or config.fsdp.strategy == "megatron":
        return config, None
    memory = torch.tensor(device_memory(device))
    dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    estimate = estimate_run(config, stats, workload, device, int(memory))
    if config.model.enable_gradient_checkpointing == "auto":
        model = config.model.model_copy(
            update={"enable_gradient_checkpointing": not estimate.fits(checkpointing=False)}
        )
        config = config.model_copy(update={"model": model})
    chosen = uses_gradient_checkpointing(config, device)
    if estimate.fits(chosen):
        return config, estimate
    options = options_that_fit(config, stats_of, workload, device, int(memory))
    description = f"a rank {estimate.describe(chosen)}. " + (
        "What would fit: " + "; or ".join(options) if options else ADVICE
    )
    if estimate.weights + estimate.mapped + estimate.optimizer > estimate.device:
        raise PreflightError(f"weights and optimizer state exceed device memory: {description}")
    say(f"Memory may run out: {description}.")
    return config, estimate


def device_memory(device: str) -> int:
    """Return the bytes that this rank may use: of its GPU, or its part of the memory of the machine or container."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
