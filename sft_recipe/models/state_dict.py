"""Converts state dicts of PyTorch (.pth, .bin, .pt) to Hugging Face folders, without running code from the file.

A config.json (or ChatLM's model_config.json) beside the file says what model it is; MiniMind's files need none.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from sft_recipe.errors import ModelError, first_line
from sft_recipe.files import digest
from sft_recipe.models import minimind
from sft_recipe.models.conversion import convert_once
from sft_recipe.models.weight_files import refuse_lfs_pointer

SUFFIXES = (".pth", ".bin", ".pt")
CONFIGS = ("config.json", "model_config.json")
# What is copied from the folder of the weights.
BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*", "generation_config.json")
CONVERSION = "1"  # increase when convert_state_dict writes something else, so that old conversions are not reused

StateDict = dict[str, torch.Tensor]


def convert_state_dict(source: Path, cache_dir: Path) -> Path:
    """Convert a state dict to a Hugging Face folder under `cache_dir`, and return the folder.

    A file is converted once. Raises ModelError: a file that is no state dict, that holds more than tensors, or whose
    model is not known.
    """
    config = next((path for name in CONFIGS if (path := source.parent / name).is_file()), None)
    others = sorted(path for pattern in BESIDE for path in source.parent.glob(pattern) if path.is_file())
    beside = [part for path in ([config] if config else []) + others for part in (path.name.encode(), path)]
    try:
        key = digest(CONVERSION.encode(), source, *beside)
    except OSError as error:
        raise ModelError(f"{source} cannot be read: {error.strerror or error}") from None

    def write(folder: Path) -> None:
        weights = read_state_dict(source)
        folder.mkdir()
        if config:
            write_model(folder, _read_config(config), weights)
        else:
            write_model(folder, *minimind.from_state_dict(weights, str(source)))
        for path in others:
            shutil.copy(path, folder)

    return convert_once(str(source), key, cache_dir, write)


def read_state_dict(path: Path) -> StateDict:
    """Return the tensors of a file by name, on the CPU. Raises ModelError for a file that holds anything else."""
    try:
        with path.open("rb") as file:
            refuse_lfs_pointer(path, file.read(64))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than tensors, or is damaged; it is not loaded, since that could run code. Save the "
            "weights alone: torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # the file is the user's; its unpickler raises anything for a damaged one
        raise ModelError(f"{path} cannot be read as a state dict: {type(error).__name__} {first_line(error)}") from None
    if isinstance(content, Mapping) and {"model", "optimizer"} <= content.keys():
        raise ModelError(
            f"{path} is the state of an interrupted run (model and optimizer), which cannot be continued here; name "
            f"the weights alone, as in {path.name.replace('_resume', '')}"
        )
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path} holds no state dict: expected tensors by name")
    for name, value in content.items():
        if not isinstance(name, str):
            raise ModelError(f"{path} holds no state dict: its key {name!r} is no name of a tensor")
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{path} holds no state dict: {name!r} is no tensor but a {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ModelError(f"{path} holds {name!r} as a sparse, quantized or empty (meta) tensor; save it dense")
    return dict(content)


def write_model(folder: Path, config: PretrainedConfig, weights: StateDict) -> None:
    """Write a Hugging Face folder that holds these weights. Raises OSError and SafetensorError."""
    config.save_pretrained(folder)
    save_file(_without_shared_memory(weights), folder / "model.safetensors", metadata={"format": "pt"})


def _read_config(path: Path) -> PretrainedConfig:
    """Return the configuration, with an architecture where it names none."""
    try:
        config = AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # the file is the user's; the configuration classes raise anything
        raise ModelError(f"{path} describes no model of transformers: {first_line(error)}") from None
    names: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder:
        names = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if not config.architectures and config.model_type in names:
        config.architectures = [names[config.model_type]]
    return config


def _without_shared_memory(weights: StateDict) -> StateDict:
    """Return the weights, with a copy of each that shares its memory with an earlier one; safetensors needs that."""
    seen: set[int] = set()
    result = {}
    for name, tensor in weights.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if address in seen else tensor.contiguous()
        seen.add(address)
    return result
