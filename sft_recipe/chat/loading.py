"""Loads a model for inference: tokenizer and configuration, and the weights with an adapter over them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sft_recipe.chat.source import ModelSource, model_config
from sft_recipe.errors import ModelError, first_line
from sft_recipe.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sft_recipe.language import plural
from sft_recipe.models.families import family_of
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import load_model
from sft_recipe.models.quantization import base_dtype
from sft_recipe.models.tokenizer import check_vocabulary, load_tokenizer


def load_settings(
    source: ModelSource, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Return configuration and tokenizer of a model. Raises ModelError where one cannot be used."""
    settings = model_config(source.name, trust_remote_code)
    config = load_hf_config(settings, source.model)
    tokenizer = load_tokenizer(settings, source.settings, family_of(config))
    check_vocabulary(tokenizer, source.model)
    return config, tokenizer


def load_module(
    source: ModelSource, config: PretrainedConfig, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """Return the model in evaluation mode on the device, as a PeftModel where the source has an adapter.

    An adapter that was trained over weights in 4 bits runs over the same. Raises ModelError where weights or adapter
    cannot be used, or do not fit into the memory of the device, and PreflightError without bitsandbytes.
    """
    trained_in = base_dtype(source.adapter / ADAPTER_WEIGHTS) if source.adapter else None
    dtype, quantize_on = trained_in or _dtype(config, device), device if trained_in else None
    module: Any = load_model(source.model.folder, config, dtype, trust_remote_code, quantize_on)
    if source.adapter:
        module = _with_adapter(module, source.adapter)
    try:
        return module.to(device).eval()
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{source.name} does not fit into the free memory of {device}; --device cpu needs no GPU"
        ) from None


def _dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of the stored weights; on CPUs fp32 in place of fp16, which they compute slowly."""
    stored: Any = config.dtype or torch.float32
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored


def _with_adapter(module: Any, adapter: Path) -> Any:
    """Raises ModelError where the adapter has not the weights that its configuration asks for on this model."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
            found = set(file.keys())
        adapted = PeftModel.from_pretrained(module, str(adapter), low_cpu_mem_usage=True)
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"the adapter {adapter} cannot be loaded: {first_line(error)}") from None
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(expected - found):
        raise ModelError(
            f"{adapter / ADAPTER_WEIGHTS} lacks {plural(len(missing), 'weight')} that {ADAPTER_CONFIG} asks for, such "
            f"as {missing[0]}: the adapter is incomplete, or was made for another model"
        )
    return adapted
