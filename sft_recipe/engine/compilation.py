"""Compiles the layers of a model with torch.compile, which fuses what lies between their matrix products."""

import torch
from transformers import PreTrainedModel

from sft_recipe.engine import patches


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the forward of each layer for any number of tokens, when it is first called.

    Equal layers share the compiled code. The hooks of FSDP2 and gradient checkpointing run around it. Packed attention
    depends on the documents of a micro-batch and is not compiled: see attention/packed.py.
    """
    names = patches.layer_class_names(model)
    for layer in model.modules():
        if type(layer).__name__ in names:
            layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]
