"""Weights in 4 bits for a rehearsal: of the right sizes and dtypes, with numbers that do not exist."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from sft_recipe.models.quantization import BLOCK, OUTER_BLOCK, quantized_layers


def pack_linear_layers(model: Any, dtype: torch.dtype) -> None:
    """Replace the layers that loading would quantize; changes bitsandbytes for good.

    Its class of parameters holds no fake tensors, so that these are plain ones.
    """
    from bitsandbytes.nn import Linear4bit, modules

    for name, layer in quantized_layers(model).items():
        shape = layer.weight.shape
        with _disable_current_modes(), torch.device("meta"):
            packed: Any = Linear4bit(layer.in_features, layer.out_features, False, dtype, True, "nf4", dtype)
        size = shape.numel() // 2 // dtype.itemsize
        packed.weight = nn.Parameter(torch.empty(size, 1, dtype=dtype), requires_grad=False)
        packed.weight.compress_statistics, packed.weight.quant_type = True, "nf4"  # which peft reads
        packed.bias, packed.quant_state = layer.bias, _state(shape, dtype)
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # as transformers marks it
    vars(modules)["fix_4bit_weight_quant_state_from_module"] = _find_scales


def _state(shape: torch.Size, dtype: torch.dtype) -> Any:
    """The scales of a matrix, in 8 bits, and those of the scales."""
    from bitsandbytes.functional import QuantState

    blocks = -(-shape.numel() // BLOCK)
    outer = QuantState(
        torch.empty(-(-blocks // OUTER_BLOCK)), code=torch.empty(256), blocksize=OUTER_BLOCK, dtype=torch.float32
    )
    scales, code = torch.empty(blocks, dtype=torch.uint8), torch.empty(16)
    return QuantState(scales, shape, code, BLOCK, "nf4", dtype, torch.empty(()), outer)


def _find_scales(layer: Any) -> None:
    layer.weight.quant_state = layer.quant_state
