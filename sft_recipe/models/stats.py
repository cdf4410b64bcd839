"""Builds the model without memory: counts its parameters, and reports what is wrong before any weight is read."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from sft_recipe.config.auto import PACKED_ATTENTION, attention
from sft_recipe.config.schema import Config
from sft_recipe.errors import ConfigError, ModelError, first_line
from sft_recipe.models.adapters import add_adapters, check_modules
from sft_recipe.models.dims import ModelDims
from sft_recipe.models.families import family_of
from sft_recipe.models.flops import MatmulParams, matmul_params
from sft_recipe.models.freezing import describe_trained, freeze_weights
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import build_model
from sft_recipe.models.quantization import check_quantizable
from sft_recipe.models.resolve import ResolvedModel
from sft_recipe.models.seq2seq_sizes import Seq2SeqDims, Seq2SeqMatmulParams

Products = MatmulParams | Seq2SeqMatmulParams


@dataclass(frozen=True)
class ModelStats:
    """Counts all and trainable parameters; `dims` and `products` are None for unknown architectures.

    `products` is None also where weights are frozen: how much their gradients cost depends on what trains below them.
    """

    total: int
    trainable: int
    dims: ModelDims | None = None
    products: Products | None = None
    positions: "Positions | None" = None
    trained: str = ""  # what trains, where that is a part of the model
    quantized: int = 0  # parameters in 4 bits
    stored: torch.dtype = torch.float32  # of the weights in the model's folder


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

    Raises ModelError for a model that transformers has no class for, that lacks the chosen attention, or that has
    nothing to quantize, and
    ConfigError for LoRA modules and for weights to freeze that the model lacks.
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
    dims, products = _sizes(built, config)
    stored = built.config.dtype or torch.float32
    stats = ModelStats(total, _trained(built), dims, products, Positions.of(built), stored=stored)
    if config.model.is_partly_frozen:
        freeze_weights(built, config.model.freeze, config.model.train_only)
        return replace(stats, trainable=_trained(built), products=None, trained=describe_trained(built))
    if not config.lora.enabled:
        return stats
    lora = config.lora
    quantized = check_quantizable(built) if lora.quantize else 0
    check_modules(lora, [name for name, _ in built.named_modules()])
    adapted = add_adapters(built, lora.rank, lora.alpha, lora.target_modules, lora.exclude_modules)
    adapters = sum(parameter.numel() for parameter in adapted.parameters()) - total
    if isinstance(products, MatmulParams):
        products = replace(products, adapters=adapters)
    elif products:
        products = Seq2SeqMatmulParams.of_model(built)
    return replace(stats, total=total + adapters, trainable=_trained(adapted), products=products, quantized=quantized)


def _trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _sizes(model: Any, config: Config) -> tuple[ModelDims | None, Products | None]:
    if config.data.has_targets:
        settings = config.data, config.model.attn_implementation
        return Seq2SeqDims.of_model(model.config, *settings), Seq2SeqMatmulParams.of_model(model)
    dims = ModelDims.of(model.config.to_dict())
    return dims, MatmulParams.of(dims, matmul_params(model, dims)) if dims else None


def _on_meta(config: Config, model: ResolvedModel, attention: str) -> Any:
    hf_config = load_hf_config(config.model, model)
    try:
        with torch.device("meta"):
            chosen = None if attention == PACKED_ATTENTION else attention  # the engine knows which models support it
            built = build_model(hf_config, config.model.trust_remote_code, chosen)
    except Exception as error:  # the model's code raises anything for sizes that do not fit each other
        raise ModelError(f"{model.name} cannot be built ({family_of(hf_config).name}): {first_line(error)}") from None
    if not hf_config.architectures:
        raise ModelError(
            f"{model.folder}/config.json names no architecture; add {type(built).__name__!r} to `architectures`"
        )
    return built


class StatsOf:
    """The statistics of a model with a configuration's adapters are counted once for each kind of LoRA."""

    def __init__(self, model: ResolvedModel, device: str):
        self.model, self.device = model, device
        self._known: dict[tuple[bool, bool], ModelStats] = {}

    def __call__(self, config: Config) -> ModelStats:
        """Return them. Raises what `model_stats` raises."""
        kind = config.lora.enabled, config.lora.quantize
        if kind not in self._known:
            self._known[kind] = model_stats(config, self.model, self.device)
        return self._known[kind]
