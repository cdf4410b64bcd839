"""Loads a model's weights, and refuses those that would leave a part of the model at random values."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_recipe.errors import ModelError, first_line

log = logging.getLogger(__name__)

SHOWN = 3  # names in a message
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
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **chosen)


def load_model(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of `folder`, built with `config`, with its weights in `dtype`.

    Raises ModelError where the folder lacks a weight, or has one of another shape, or where `config` ties weights that
    differ; weights that the model has no place for are a warning.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported here, with all others
        )
    except Exception as error:  # of safetensors, transformers, or the model's own code
        raise ModelError(f"the weights of {folder} cannot be loaded: {first_line(error)}") from None
    model, report = loaded
    check_weights(folder, report)
    _check_tied(folder, model)
    return model


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


def _check_tied(folder: Path, model: PreTrainedModel) -> None:
    """Raise ModelError where weights should be the same, but the folder holds different ones, so that they are not."""
    model_ties: Any = model  # transformers annotates neither
    untied = model_ties.get_expanded_tied_weights_keys(all_submodels=True).keys() - model_ties.all_tied_weights_keys
    if untied:
        raise ModelError(
            f"{folder}: its configuration says that head and embeddings are the same weights, but the folder holds a "
            f"different {_names(sorted(untied))}. Set model.override_config={{tie_word_embeddings: false}}."
        )


def _names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + _and_more(len(names) - SHOWN)


def _and_more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""
