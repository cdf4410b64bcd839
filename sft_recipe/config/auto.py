"""Resolves the value `auto` of a key on a device: each function takes the configuration and returns the value used."""

import importlib.util

import torch

from sft_recipe.config.schema import Config, FsdpConfig
from sft_recipe.errors import PreflightError

PACKED_ATTENTION = "sft_packed"  # the name of engine/attention/packed.py among transformers' attention implementations


def compute_dtype(fsdp: FsdpConfig, device: str) -> str:
    """Return bf16 or fp32: the configured one, or for `auto` bf16 if the hardware multiplies it."""
    if fsdp.mixed_precision.param_dtype != "auto":
        return fsdp.mixed_precision.param_dtype
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else has_fast_bf16()
    return "bf16" if fast else "fp32"


def effective_strategy(fsdp: FsdpConfig, device: str) -> str:
    """Return the strategy that runs: on a CPU fsdp2 for fsdp, since PyTorch's FSDP1 does not support CPUs."""
    return "fsdp2" if device == "cpu" and fsdp.strategy == "fsdp" else fsdp.strategy


def uses_gradient_checkpointing(config: Config, device: str) -> bool:
    """Return the configured or estimated choice; if there is neither, True on GPUs."""
    chosen = config.model.enable_gradient_checkpointing
    return device == "cuda" if chosen == "auto" else bool(chosen)


def attention(config: Config, device: str) -> str:
    """Return the attention implementation: for `auto` flash-attn if installed on a GPU, else packed attention.

    Raises PreflightError if sequence parallelism lacks flash attention.
    """
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
    """Return True if a common prefix of documents in a micro-batch is computed once; for `auto` on CPUs.

    Raises PreflightError if the attention implementation does not support it.
    """
    chosen, is_supported = config.model.share_prefixes, attention(config, device) == PACKED_ATTENTION
    if chosen is True and not is_supported:
        raise PreflightError(f"model.share_prefixes=true needs model.attn_implementation={PACKED_ATTENTION}")
    return device == "cpu" and is_supported if chosen == "auto" else chosen


def reshards_after_forward(config: Config, on_cpu: bool) -> bool:
    """Return True if gathered parameters are freed after each pass; for `auto` on several GPUs or with offload_policy.

    A single rank would free only the copy in the compute dtype and make it again twice per micro-batch. On CPU ranks
    gathering with gloo takes a fifth of a step or more.
    """
    chosen = config.fsdp.reshard_after_forward
    frees_much = not on_cpu and (config.trainer.world_size > 1 or config.fsdp.offload_policy)
    return frees_much if chosen == "auto" else chosen


def has_fast_bf16() -> bool:
    """Return True if this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
