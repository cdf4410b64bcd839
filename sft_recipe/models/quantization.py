"""QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): the weights of linear layers in 4 bits.

They are quantized to NF4 with double quantization by bitsandbytes while a model is loaded, and stay frozen. The head,
the embeddings and the norms are not quantized. The adapters of such a run belong to these rounded weights, not to the
stored ones: what merges, exports or runs them rounds the weights in the same way.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn

from sft_recipe.config.preflight import require_bitsandbytes
from sft_recipe.errors import ModelError

BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale of 8 bits, and scales that share one in fp32
CONSTANTS = 1 / BLOCK + 4 / (BLOCK * OUTER_BLOCK)  # bytes of scales for each weight, as in section 3 of the paper
PACKED = 0.5  # bytes of a weight
BASE_DTYPE = "nf4_base_dtype"  # in the metadata of an adapter's file: the dtype that its 4-bit base computed in


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the plain linear layers of a model by their names."""
    return {name: part for name, part in model.named_modules() if type(part) is nn.Linear}


def quantized_layers(model: Any) -> dict[str, nn.Linear]:
    """Return those of the plain linear layers whose weights are quantized: all but the head, and but those with rows of
    incomplete blocks, which bitsandbytes 0.50 dequantizes wrongly on CPUs.
    """
    head, layers = model.get_output_embeddings(), linear_layers(model)
    return {name: layer for name, layer in layers.items() if layer is not head and layer.in_features % BLOCK == 0}


def check_quantizable(model: Any) -> int:
    """Return how many weights would be quantized. Raises ModelError for a model with none."""
    count = sum(layer.weight.numel() for layer in quantized_layers(model).values())
    if not count:
        raise ModelError(
            f"{type(model).__name__} has nothing to quantize: no linear layers with rows of a multiple of {BLOCK} "
            "weights; leave out --use_qlora"
        )
    return count


def loading_settings(model: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` quantizes, on `device`, what `quantized_layers` names.

    `model` is the same model without weights. The packed numbers are stored as `dtype`, in which the model computes, so
    that FSDP2 shards and gathers them like other weights. Raises PreflightError without bitsandbytes.
    """
    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    others = linear_layers(model).keys() - quantized_layers(model).keys()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=[f"{re.escape(name)}$" for name in sorted(others)],  # patterns
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def check_quantized(model: Any, expected: Mapping[str, nn.Linear]) -> None:
    """Raise ModelError unless exactly the `expected` layers of a loaded model are quantized; prepare them for training.

    bitsandbytes would repack weights for CPUs in evaluation mode, and lose precision when it packs them back.
    """
    found = packed_layers(model)
    if different := found.keys() ^ expected.keys():
        raise ModelError(
            f"{type(model).__name__} cannot be quantized: transformers treats {min(different)} in another way than "
            "other linear layers; leave out --use_qlora"
        )
    for layer in found.values():
        layer.support_avx512bf16_for_cpu = False


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers whose weights are in 4 bits, by name."""
    from bitsandbytes.nn import Linear4bit

    return {name: part for name, part in model.named_modules() if isinstance(part, Linear4bit)}


def digest(model: nn.Module) -> int:
    """Return a number of 63 bits that depends on every bit of the quantized weights, before they are sharded."""
    result = xxhash.xxh3_64()
    for _, layer in sorted(packed_layers(model).items()):
        state = layer.weight.quant_state
        for tensor in (layer.weight.data, state.absmax, state.offset, state.state2.absmax):
            result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return result.intdigest() >> 1


def round_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as training in `dtype` saw it: quantized, and dequantized to `dtype`.

    Computed on the GPU where there is one, as training does.
    """
    require_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = weight.detach().to(device, dtype)
    packed, state = quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=dtype
    )
    return dequantize_4bit(packed, state).to(weight.device)


def round_weights(model: Any, dtype: torch.dtype) -> list[str]:
    """Replace the weights that training in `dtype` quantizes by what it saw of them; returns their names."""
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.weight.data = round_weight(layer.weight, dtype).to(torch.promote_types(layer.weight.dtype, dtype))
    return [f"{name}.weight" for name in layers]


def adapter_metadata(dtype: torch.dtype | None) -> dict[str, str]:
    """Return the metadata of the file of an adapter; `dtype` is None for a base that was not quantized.

    It is one entry: safetensors writes several in a random order, and files of equal runs are equal.
    """
    return {BASE_DTYPE: str(dtype).removeprefix("torch.")} if dtype else {"format": "pt"}


def base_dtype(weights: Path) -> torch.dtype | None:
    """Return the dtype that the 4-bit base of an adapter's file computed in; None for a base that was not quantized."""
    try:
        with safe_open(weights, "pt") as file:
            name = (file.metadata() or {}).get(BASE_DTYPE)
    except (OSError, SafetensorError):
        return None  # whoever loads the weights reports it
    return getattr(torch, name) if name else None
