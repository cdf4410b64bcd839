"""The model without its memory: what it counts, and what is wrong with it, told before any weight is read."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipe.config import Config, LoraConfig
from sft_recipe.errors import ConfigError, ModelError
from sft_recipe.flops import Products, weights_in_products
from sft_recipe.memory import Layout
from sft_recipe.models import ResolvedModel


@dataclass(frozen=True)
class Shape:
    """Numbers of parameters; the sizes of the layers, where they are known."""

    total: int
    trainable: int
    layout: Layout | None = None
    products: Products | None = None


def model_shape(config: Config, model: ResolvedModel, device: str) -> Shape:
    """Build the model, and its adapters, on torch's meta device.

    Raises ModelError: no causal language model that transformers knows; an attention it does not have. ConfigError:
    LoRA modules that are not in the model.
    """
    from sft_recipe.engine.verl_config import attention

    built = _on_meta(config, model, attention(config, device))
    if not built._no_split_modules:
        raise ModelError(f"{model.name}: transformers does not say how {type(built).__name__} is split for FSDP")
    total = sum(parameter.numel() for parameter in built.parameters())
    layout = Layout.of(built.config.to_dict())
    products = Products.of(layout, weights_in_products(built, layout)) if layout else None
    if not config.lora.enabled:
        return Shape(total, total, layout, products)
    adapters = sum(parameter.numel() for parameter in _with_adapters(built, config.lora).parameters()) - total
    return Shape(total + adapters, adapters, layout, products and replace(products, adapters=adapters))


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
