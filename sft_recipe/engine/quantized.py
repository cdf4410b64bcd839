"""A model whose frozen weights are in 4 bits: quantized by every rank, and sharded by FSDP2 as it is."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from verl.utils import fsdp_utils
from verl.utils.device import get_device_id, get_device_name
from verl.utils.torch_dtypes import PrecisionType

from sft_recipe.errors import TrainingError
from sft_recipe.models import quantization


def rank_device() -> torch.device:
    """Return the device of this rank, on which it quantizes."""
    return torch.device("cuda", get_device_id()) if get_device_name() == "cuda" else torch.device("cpu")


def shared_digest(model: nn.Module) -> int:
    """Return the digest of the quantized weights. Raises TrainingError where ranks have different ones. Collective."""
    found = quantization.digest(model)
    largest = torch.tensor([found, -found], device=get_device_name())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if int(largest[0]) != -int(largest[1]):
        raise TrainingError(
            "the ranks have quantized the model to different 4-bit weights: they need the same kind of device and the "
            "same version of bitsandbytes"
        )
    return found


def shard(module: nn.Module, engine: Any) -> nn.Module:
    """Shard as verl's engine does with FSDP2, but for loading: every rank has all weights.

    verl would send a state dictionary from the first rank, without the scales. Those stay on every rank, in the layers,
    and bitsandbytes finds them there while a layer's packed weights are gathered. Only the adapters, which each rank
    has drawn, come from the first rank.
    """
    config = engine.engine_config
    module.to(rank_device())
    for layer in quantization.packed_layers(module).values():
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    for weight in module.parameters():
        if weight.requires_grad:
            dist.broadcast(weight.data, src=0)
    precision = fsdp_utils.MixedPrecisionPolicy(
        param_dtype=engine.compute_dtype,
        reduce_dtype=PrecisionType.to_dtype(config.mixed_precision["reduce_dtype"]),
        cast_forward_inputs=True,
    )
    settings = {
        "mesh": engine.device_mesh,
        "mp_policy": precision,
        "offload_policy": fsdp_utils.CPUOffloadPolicy(pin_memory=True) if config.offload_policy else None,
        "reshard_after_forward": config.reshard_after_forward,
    }
    fsdp_utils.apply_fsdp2(module, settings, config)
    return module
