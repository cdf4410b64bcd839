"""Resolves the value `auto` of a key on a device: each function takes the configuration and returns the value used."""

import logging
import os
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from sft_recipe.config.schema import Config, FsdpConfig
from sft_recipe.errors import PreflightError

log = logging.getLogger(__name__)

PACKED_ATTENTION = "sft_packed"  # the name of engine/attention/packed.py among transformers' attention implementations

# FlashAttention's packages, best first: transformers' name, their module, and the generations of GPUs (major compute
# capability) that they were made for.
FLASH_ATTENTION = (
    ("flash_attention_4", "flash_attn.cute", (9, 10, 11)),
    ("flash_attention_3", "flash_attn_interface", (9,)),
    ("flash_attention_2", "flash_attn", (8, 9, 10, 11, 12)),
)


def compute_dtype(fsdp: FsdpConfig, device: str) -> str:
    """Return bf16, fp16 or fp32: the configured one, or for `auto` the best that the hardware multiplies.

    GPUs before Ampere emulate bf16; those with tensor cores get fp16.
    """
    if fsdp.mixed_precision.param_dtype != "auto":
        return fsdp.mixed_precision.param_dtype
    if device != "cuda":
        return "bf16" if has_fast_bf16() else "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if torch.cuda.get_device_capability() >= (7, 0) else "fp32"


def effective_strategy(fsdp: FsdpConfig, device: str) -> str:
    """Return the strategy that runs: on a CPU fsdp2 for fsdp, since PyTorch's FSDP1 does not support CPUs."""
    return "fsdp2" if device == "cpu" and fsdp.strategy == "fsdp" else fsdp.strategy


def uses_gradient_checkpointing(config: Config, device: str) -> bool:
    """Return the configured or estimated choice; if there is neither, True on GPUs."""
    chosen = config.model.enable_gradient_checkpointing
    return device == "cuda" if chosen == "auto" else bool(chosen)


def attention(config: Config, device: str) -> str:
    """Return the attention implementation: for `auto` flash-attn where it runs on the GPU, else packed attention.

    Raises PreflightError for an attention that ranks which share a sequence cannot compute.
    """
    chosen = config.model.attn_implementation
    if chosen == "auto":
        is_gpu = device == "cuda" and torch.cuda.is_available()
        is_half = is_gpu and compute_dtype(config.fsdp, device) != "fp32"  # FlashAttention has no kernels for fp32
        chosen = (is_half and flash_attention()) or PACKED_ATTENTION
    is_split = config.fsdp.ulysses_sequence_parallel_size > 1
    if is_split and chosen != PACKED_ATTENTION and not chosen.startswith("flash_attention"):
        raise PreflightError(
            f"fsdp.ulysses_sequence_parallel_size={config.fsdp.ulysses_sequence_parallel_size} needs "
            f"model.attn_implementation={PACKED_ATTENTION} or flash attention, but it is {chosen}: set it to auto"
        )
    return chosen


def flash_attention() -> str | None:
    """Return transformers' name for the best FlashAttention package that runs on this rank's GPU, or None.

    AMD's GPUs have other generations, and a package of their own with the name of flash-attn 2.
    """
    generation, _ = torch.cuda.get_device_capability(_rank_device())
    for name, _, generations in FLASH_ATTENTION:
        is_made_for = name == "flash_attention_2" if torch.version.hip else generation in generations
        if is_made_for and _is_installed(name) and flash_attention_runs(name):
            return name
    return None


@lru_cache
def flash_attention_runs(name: str, head_size: int = 64) -> bool:
    """Return whether a FlashAttention package runs on this rank's GPU with heads of this size.

    It is tried on a few tokens: a package that was built for another PyTorch fails only then.
    """
    module = next(module for known, module, _ in FLASH_ATTENTION if known == name)
    try:
        _attend(import_module(module).flash_attn_varlen_func, head_size)
        return True
    except Exception as error:  # of a package built for another PyTorch, or for other GPUs
        text = "%s is installed and does not run with heads of size %d: %s. Using the next best attention."
        log.warning(text, module, head_size, error)
        return False


def _rank_device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _is_installed(name: str) -> bool:
    """Whether transformers finds the package of an attention implementation."""
    from transformers import utils

    return bool(getattr(utils, f"is_{name.replace('attention', 'attn')}_available", lambda: False)())


def _attend(varlen_attention: Any, head_size: int) -> None:
    """Run forward and backward over two documents of eight tokens."""
    device = _rank_device()
    query = torch.ones(16, 1, head_size, dtype=torch.float16, device=device, requires_grad=True)
    offsets = torch.tensor([0, 8, 16], dtype=torch.int32, device=device)
    lengths = dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=8, max_seqlen_k=8)
    attended = varlen_attention(query, query, query, **lengths, causal=True)
    (attended[0] if isinstance(attended, tuple) else attended).sum().backward()
    torch.cuda.synchronize(device)


def shares_prefixes(config: Config, device: str) -> bool:
    """Return True if a common prefix of documents in a micro-batch is computed once; for `auto` on CPUs.

    Raises PreflightError if the attention implementation does not support it.
    """
    chosen, is_supported = config.model.share_prefixes, attention(config, device) == PACKED_ATTENTION
    if chosen is True and not is_supported:
        raise PreflightError(f"model.share_prefixes=true needs model.attn_implementation={PACKED_ATTENTION}")
    return device == "cpu" and is_supported if chosen == "auto" else chosen


def reshards_after_forward(config: Config, on_cpu: bool) -> bool:
    """Return True if gathered parameters are freed after each pass.

    For `auto` on several GPUs, with offload_policy, and with LoRA, whose frozen weights would all exist twice. A single
    rank would else free only the copy in the compute dtype and make it again twice per micro-batch. On CPU ranks
    gathering with gloo takes a fifth of a step or more.
    """
    chosen = config.fsdp.reshard_after_forward
    frees_much = not on_cpu and (config.trainer.world_size > 1 or config.fsdp.offload_policy or config.lora.enabled)
    return frees_much if chosen == "auto" else chosen


def has_fast_bf16() -> bool:
    """Return True if this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
