"""Loads a model's weights, and refuses those that would leave a part of the model at random values."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sft_recipe.errors import ModelError, first_line
from sft_recipe.models import quantization
from sft_recipe.models.families import SEQ2SEQ, family_of
from sft_recipe.models.untied_head import HEAD, as_tied, has_untied_head, separate_head

log = logging.getLogger(__name__)

SHOWN = 3  # names in a message
OTHER_MODALITIES = {"vision_tower", "multi_modal_projector"}  # modules of transformers' encoder-decoders
# What tools put before the names of weights, with the tool or method that does.
PREFIXES = {
    "base_model.model.": "peft, for a model with LoRA adapters",
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "model.base_model.": "peft",
}


def build_model(
    config: PretrainedConfig, trust_remote_code: bool = False, attention: str | None = None
) -> PreTrainedModel:
    """Return the model with random weights, as its code draws them; without memory inside `torch.device("meta")`.

    `attention` is the name of an attention implementation; by default the one that `config` names.
    """
    chosen = {"attn_implementation": attention} if attention else {}
    is_untied = has_untied_head(config)
    if is_untied:
        config = as_tied(config)
    model = family_of(config).auto.from_config(config, trust_remote_code=trust_remote_code, **chosen)
    if is_untied:
        separate_head(model)
    freeze_other_modalities(model)
    return model


def load_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    quantize_on: torch.device | None = None,
) -> PreTrainedModel:
    """Return the model of `folder`, built with `config`, with its weights in `dtype`.

    With `quantize_on` the weights of linear layers are quantized on that device, one at a time; see quantization.py.

    Raises ModelError where the folder lacks a weight, or has one of another shape, or where `config` ties weights that
    differ; weights that the model has no place for are a warning.
    """
    is_untied = has_untied_head(config)
    settings: dict[str, Any] = {}
    if quantize_on:
        with torch.device("meta"):
            empty = build_model(config, trust_remote_code)
        settings = quantization.loading_settings(empty, dtype, quantize_on)
    try:
        loaded: Any = family_of(config).auto.from_pretrained(
            folder,
            config=as_tied(config) if is_untied else config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported here, with all others
            **settings,
        )
    except Exception as error:  # of safetensors, transformers, or the model's own code
        raise ModelError(f"the weights of {folder} cannot be loaded: {first_line(error)}") from None
    model, report = loaded
    check_weights(folder, report)
    _check_tied(folder, model, may_differ={HEAD} if is_untied else set())
    if is_untied:
        separate_head(model)
    if quantize_on:
        quantization.check_quantized(model, quantization.quantized_layers(empty))
    freeze_other_modalities(model)
    return model


def freeze_other_modalities(model: nn.Module) -> None:
    """Let the weights not train that text does not reach: T5Gemma 2 also reads images."""
    for name, weight in model.named_parameters():
        if not OTHER_MODALITIES.isdisjoint(name.split(".")):
            weight.requires_grad_(False)


def check_weights(source: Path, report: Mapping[str, Any]) -> None:
    """Check the loading report of transformers; raises ModelError for missing weights and those of another shape."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(report["mismatched_keys"], key=str)
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"{source}: the weights do not fit config.json: {name} has the shape {tuple(stored)}, but the "
            f"configuration asks for {tuple(wanted)}" + _and_more(len(mismatched) - 1)
        )
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, which would be trained from random values: "
            f"{_names(missing)}. {_likely_cause(missing, unexpected)}"
        )
    if unexpected:
        log.warning(
            "%s holds %d weights that the model has no place for; they are not used: %s",
            source, len(unexpected), _names(unexpected),
        )  # fmt: skip


def _likely_cause(missing: list[str], unexpected: list[str]) -> str:
    for prefix, origin in PREFIXES.items():
        found = [name for name in unexpected if name.startswith(prefix)]
        if found:
            merge = " (merge the adapters first)" if "base_model" in prefix else ""
            return f"Names there begin with {prefix!r} ({origin}): save the model without it{merge}."
    if any("lm_head" in name or "embed_out" in name for name in missing) and not unexpected:
        return (
            "If the model's head and its embeddings are the same weights, set "
            "model.override_config={tie_word_embeddings: true}; else get the complete model."
        )
    if unexpected:
        return f"It holds others that the model has no place for: {_names(unexpected)}. Does config.json belong to it?"
    return "Get the complete model: an incomplete download or a failed conversion is the likely cause."


def _check_tied(folder: Path, model: PreTrainedModel, may_differ: set[str]) -> None:
    """Raise ModelError where weights should be the same, but the folder holds different ones, so that they are not."""
    model_ties: Any = model  # transformers annotates neither
    untied = model_ties.get_expanded_tied_weights_keys(all_submodels=True).keys() - model_ties.all_tied_weights_keys
    if untied := untied - may_differ:
        remedy = "Set model.override_config={tie_word_embeddings: false}."
        if family_of(model.config) is SEQ2SEQ:  # would separate the embeddings of encoder and decoder as well
            remedy = f"A {model.config.model_type} with such weights is not supported."
        raise ModelError(
            f"{folder}: its configuration says that head and embeddings are the same weights, but the folder holds a "
            f"different {_names(sorted(untied))}. {remedy}"
        )


def _names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + _and_more(len(names) - SHOWN)


def _and_more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""
