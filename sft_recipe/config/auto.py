"""What the value `auto` of a key means on a device: each function takes the configuration and returns what is used."""

import importlib.util

import torch

from sft_recipe.config.schema import Config, FsdpConfig
from sft_recipe.errors import PreflightError

PACKED_ATTENTION = "sft_packed"  # the name of engine/attention/packed.py among transformers' attention implementations


def compute_dtype(fsdp: FsdpConfig, device: str) -> str:
    """bf16 or fp32: as asked for, or bf16 where the hardware multiplies it."""
    if fsdp.mixed_precision.param_dtype != "auto":
        return fsdp.mixed_precision.param_dtype
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else has_fast_bf16()
    return "bf16" if fast else "fp32"


def effective_strategy(fsdp: FsdpConfig, device: str) -> str:
    """torch's FSDP1 refuses the CPU; there fsdp runs as fsdp2."""
    return "fsdp2" if device == "cpu" and fsdp.strategy == "fsdp" else fsdp.strategy


def uses_gradient_checkpointing(config: Config, device: str) -> bool:
    """What was chosen, by the user or by the memory plan; without either on on GPUs, where memory is short."""
    chosen = config.model.enable_gradient_checkpointing
    return device == "cuda" if chosen == "auto" else bool(chosen)


def attention(config: Config, device: str) -> str:
    """The attention implementation: flash-attn where it is installed on a GPU, else ours on PyTorch's kernels."""
    chosen = config.model.attn_implementation
    if chosen == "auto":
        has_flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
        chosen = "flash_attention_2" if has_flash else PACKED_ATTENTION
    if config.fsdp.ulysses_sequence_parallel_size > 1 and not chosen.startswith("flash_attention"):
        raise PreflightError(
            f"fsdp.ulysses_sequence_parallel_size={config.fsdp.ulysses_sequence_parallel_size} needs flash attention, "
            f"but attention here is {chosen}: install flash-attn on a machine with GPUs, or set the size to 1"
        )
    return chosen


def shares_prefixes(config: Config, device: str) -> bool:
    """Whether what several documents of a micro-batch begin with runs once; on by default where it was measured."""
    chosen, can = config.model.share_prefixes, attention(config, device) == PACKED_ATTENTION
    if chosen is True and not can:
        raise PreflightError(f"model.share_prefixes=true needs model.attn_implementation={PACKED_ATTENTION}")
    return device == "cpu" and can if chosen == "auto" else chosen


def reshards_after_forward(config: Config, on_cpu: bool) -> bool:
    """On by default where it frees much: among several GPUs, and with parameters that wait in CPU memory.

    One rank alone frees the copy in the compute dtype, and makes it again twice in each micro-batch. Ranks on CPUs wait
    for what they gather: with gloo it takes a fifth of a step or more.
    """
    chosen = config.fsdp.reshard_after_forward
    frees_much = not on_cpu and (config.trainer.world_size > 1 or config.fsdp.offload_policy)
    return frees_much if chosen == "auto" else chosen


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
