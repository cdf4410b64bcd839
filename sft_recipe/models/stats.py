"""Builds the model without memory: counts its parameters, and reports what is wrong before any weight is read."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from sft_recipe.config.auto import PACKED_ATTENTION, attention
from sft_recipe.config.schema import Config, LoraConfig
from sft_recipe.errors import ConfigError, ModelError, first_line
from sft_recipe.models.adapters import check_modules
from sft_recipe.models.dims import ModelDims
from sft_recipe.models.flops import MatmulParams, matmul_params
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import build_model
from sft_recipe.models.resolve import ResolvedModel


@dataclass(frozen=True)
class ModelStats:
    """Counts all and trainable parameters; `dims` and `products` are None for unknown architectures."""

    total: int
    trainable: int
    dims: ModelDims | None = None
    products: MatmulParams | None = None
    positions: "Positions | None" = None


@dataclass(frozen=True)
class Positions:
    """Counts the positions that a model was made for; there are no more where each has a learned embedding."""

    count: int
    are_learned: bool

    @classmethod
    def of(cls, model: Any) -> "Positions | None":
        """Read them from a model's configuration, with the factor of its RoPE scaling; None where it names none."""
        config = model.config.get_text_config()
        count = getattr(config, "max_position_embeddings", None)
        if not isinstance(count, int):
            return None
        tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        are_learned = any(
            table is not model.get_input_embeddings() and count <= table.num_embeddings <= count + 2 for table in tables
        )
        rope = getattr(config, "rope_parameters", None) or {}
        scaled = (rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 1)
        return cls(max(count, int(scaled)), are_learned)

    def notice(self, model: str, max_length: int, longest: int) -> str | None:
        """Return what to say where examples may have more positions; the longest one now has `longest` tokens.

        Raises ConfigError where an example needs a position without an embedding.
        """
        if max_length <= self.count or (self.are_learned and longest <= self.count):
            return None
        if self.are_learned:
            raise ConfigError(
                f"an example has {longest:,} tokens, but {model} has embeddings for {self.count:,} positions only: "
                f"MAX_LENGTH={self.count} (now {max_length})"
            )
        longer = f"the longest example has {longest:,} tokens" if longest > self.count else "no example is longer yet"
        return (
            f"MAX_LENGTH is {max_length:,}, but {model} was made for {self.count:,} positions "
            f"(max_position_embeddings); {longer}. Beyond them a model is weak until it has been trained there, or its "
            "RoPE is scaled (model.override_config.rope_parameters)."
        )


def model_stats(config: Config, model: ResolvedModel, device: str) -> ModelStats:
    """Build the model and its adapters on torch's meta device, and count.

    Raises ModelError for a model that is no causal language model of transformers or lacks the chosen attention, and
    ConfigError for LoRA modules that the model lacks.
    """
    built = _on_meta(config, model, attention(config, device))
    if not getattr(built, "_no_split_modules", None):  # a private name; see engine/patches.py
        raise ModelError(f"{model.name}: transformers does not say how {type(built).__name__} is split for FSDP")
    if getattr(built, "_is_stateful", False):
        raise ModelError(
            f"{model.name}: {type(built).__name__} is recurrent: it carries a state from token to token, which this "
            "program does not train; models that combine tokens by attention alone can be trained"
        )
    total = sum(parameter.numel() for parameter in built.parameters())
    dims = ModelDims.of(built.config.to_dict())
    products = MatmulParams.of(dims, matmul_params(built, dims)) if dims else None
    stats = ModelStats(total, total, dims, products, Positions.of(built))
    if not config.lora.enabled:
        return stats
    adapters = sum(parameter.numel() for parameter in _with_adapters(built, config.lora).parameters()) - total
    products = products and replace(products, adapters=adapters)
    return replace(stats, total=total + adapters, trainable=adapters, products=products)


def _on_meta(config: Config, model: ResolvedModel, attention: str) -> Any:
    hf_config = load_hf_config(config.model, model)
    try:
        with torch.device("meta"):
            chosen = None if attention == PACKED_ATTENTION else attention  # the engine knows which models support it
            built = build_model(hf_config, config.model.trust_remote_code, chosen)
    except Exception as error:  # the model's code raises anything for sizes that do not fit each other
        raise ModelError(f"{model.name} cannot be built as a causal language model: {first_line(error)}") from None
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
