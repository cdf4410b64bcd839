"""Builds the model without memory: counts its parameters, and reports what is wrong before any weight is read."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipe.config.auto import attention
from sft_recipe.config.schema import Config, LoraConfig
from sft_recipe.errors import ConfigError, ModelError
from sft_recipe.models.adapters import check_modules
from sft_recipe.models.dims import ModelDims
from sft_recipe.models.flops import MatmulParams, matmul_params
from sft_recipe.models.resolve import ResolvedModel


@dataclass(frozen=True)
class ModelStats:
    """Counts all and trainable parameters; `dims` and `products` are None for unknown architectures."""

    total: int
    trainable: int
    dims: ModelDims | None = None
    products: MatmulParams | None = None


def model_stats(config: Config, model: ResolvedModel, device: str) -> ModelStats:
    """Build the model and its adapters on torch's meta device, and count.

    Raises ModelError for a model that is no causal language model of transformers or lacks the chosen attention, and
    ConfigError for LoRA modules that the model lacks.
    """
    built = _on_meta(config, model, attention(config, device))
    if not getattr(built, "_no_split_modules", None):  # a private name; see engine/patches.py
        raise ModelError(f"{model.name}: transformers does not say how {type(built).__name__} is split for FSDP")
    total = sum(parameter.numel() for parameter in built.parameters())
    dims = ModelDims.of(built.config.to_dict())
    products = MatmulParams.of(dims, matmul_params(built, dims)) if dims else None
    if not config.lora.enabled:
        return ModelStats(total, total, dims, products)
    adapters = sum(parameter.numel() for parameter in _with_adapters(built, config.lora).parameters()) - total
    return ModelStats(total + adapters, adapters, dims, products and replace(products, adapters=adapters))


def _on_meta(config: Config, model: ResolvedModel, attention: str) -> Any:
    try:
        hf_config = AutoConfig.from_pretrained(model.folder, trust_remote_code=config.model.trust_remote_code)
        hf_config.update(config.model.override_config)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(
                hf_config, attn_implementation=attention, trust_remote_code=config.model.trust_remote_code
            )
    except (ValueError, ImportError, KeyError, OSError, TypeError, AttributeError) as error:
        raise ModelError(f"{model.name} cannot be built as a causal language model: {error}") from None
    if not hf_config.architectures:
        raise ModelError(
            f"{model.folder}/config.json names no architecture; add {type(built).__name__!r} to `architectures`"
        )
    return built


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    check_modules(lora, [name for name, _ in model.named_modules()])
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={lora.target_modules}: {str(error).splitlines()[0]}") from None
