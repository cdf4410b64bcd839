"""A model's configuration: its config.json, with the values of `model.override_config` in it."""

import difflib
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers import __version__ as transformers_version
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sft_recipe.config.schema import ModelConfig
from sft_recipe.config.secrets import without_secrets
from sft_recipe.errors import ConfigError, ModelError, first_line
from sft_recipe.models.families import family_of
from sft_recipe.models.resolve import ResolvedModel
from sft_recipe.models.untied_head import has_untied_head, note_untied_head

OTHER_TASKS = ("Classification", "QuestionAnswering", "MaskedLM", "RewardModel", "ForScore")
ROPE = "rope_parameters"
ROPE_KEYS = (ROPE, "rope_scaling", "rope_theta")  # transformers keeps all of them in the first
IDENTITY = ("model_type", "architectures", "auto_map", "quantization_config", "transformers_version")
NEEDS_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")


def load_hf_config(settings: ModelConfig, model: ResolvedModel) -> PretrainedConfig:
    """Return the configuration that the model is built with, and saved with.

    Raises ModelError for a model that does not predict text, or whose weights are quantized, and ConfigError for a
    value of `model.override_config` that the model's configuration has no place for.
    """
    config = read_hf_config(model, settings.trust_remote_code)
    _require_language_model(config, model)
    return _with_overrides(config, settings.override_config) if settings.override_config else config


def read_hf_config(model: ResolvedModel, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of the model's folder. Raises ModelError where it cannot be read."""
    try:
        config = AutoConfig.from_pretrained(model.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the configuration is the user's; its classes raise anything
        reason = first_line(error)
        if "does not recognize this architecture" in reason:
            reason = (
                f"transformers {transformers_version} does not know its architecture. A newer one may, but verl, which "
                "trains here, pins this version"
            )
        raise ModelError(f"{model.name} cannot be read: {reason}") from None
    note_untied_head(config, model.folder)
    return config


def _require_language_model(config: PretrainedConfig, model: ResolvedModel) -> None:
    name, family = next(iter(config.architectures or []), ""), family_of(config)
    if any(task in name for task in OTHER_TASKS):
        raise ModelError(f"{model.name} is a {name}, without a head that predicts tokens: no {family.name}")
    if not family.has(config):
        raise ModelError(f"{model.name} is a {config.model_type}, which transformers has no {family.name} for")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method", "unknown")
        raise ModelError(
            f"{model.name} has quantized weights ({getattr(method, 'value', method)}), which cannot be trained: name "
            "the model that they were made from (bf16 or fp32 weights); --use_qlora trains over that in 4 bits"
        )


def _with_overrides(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """Rebuild `config` through its own class, which derives values from others, and check that each value arrived."""
    given = _with_rope_parameters(config, overrides)
    known = {*config.to_dict(), *config.attribute_map}
    for key in given:
        if key in IDENTITY:
            raise ConfigError(f"model.override_config: {key} belongs to the model's weights and cannot be changed")
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *(ROPE_KEYS if ROPE in known else ())], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"model.override_config: {type(config).__name__} has no {key}{hint}")
    settings = {key: value for key, value in config.to_dict().items() if key not in ROPE_KEYS or key == ROPE}
    for key, value in given.items():
        is_nested = isinstance(value, Mapping) and isinstance(settings.get(key), Mapping) and key != ROPE
        settings[config.attribute_map.get(key, key)] = {**settings[key], **value} if is_nested else value
    try:
        rebuilt = type(config).from_dict(settings)
    except Exception as error:  # the configuration classes raise anything for a value that they refuse
        reason = without_secrets(str(error).strip().replace("\n", " ")) or type(error).__name__
        raise ConfigError(
            f"model.override_config={without_secrets(dict(overrides))}: {type(config).__name__} says: {reason}"
        ) from None
    if has_untied_head(config):
        rebuilt.tie_word_embeddings = False
    for key, value in given.items():
        found = getattr(rebuilt, key, None)
        if not _has_arrived(value, found):
            raise ConfigError(
                f"model.override_config: {key}={without_secrets(value)} has no effect on {type(config).__name__}, "
                f"where it is {found}"
            )
    return rebuilt


def _with_rope_parameters(config: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `overrides` with all that concerns rotary embeddings in `rope_parameters`; theta stays unless given."""
    given = {key: value for key, value in overrides.items() if key not in ROPE_KEYS}
    current = getattr(config, ROPE, None)
    if len(given) == len(overrides):
        return given
    if current is None or any(isinstance(value, Mapping) for value in current.values()):  # one for each kind of layer
        return dict(overrides)
    rope = dict(current)
    for key in ("rope_scaling", ROPE):
        if key in overrides:
            kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
            scaling = dict(overrides[key] or {})
            kind = scaling.pop("type", scaling.get("rope_type", "default"))
            if kind not in (*ROPE_INIT_FUNCTIONS, "default"):
                types = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
                raise ConfigError(f"model.override_config: there is no rope_type {kind}; there are {types}")
            if kind in NEEDS_ORIGINAL_LENGTH:  # else it would be taken from an overridden max_position_embeddings
                kept["original_max_position_embeddings"] = config.max_position_embeddings
            rope = {**kept, **scaling, "rope_type": kind}
    if "rope_theta" in overrides:
        rope["rope_theta"] = overrides["rope_theta"]
    return {**given, ROPE: rope}


def _has_arrived(value: Any, found: Any) -> bool:
    if isinstance(value, Mapping):
        at = found.get if isinstance(found, Mapping) else lambda key: getattr(found, key, None)
        return all(_has_arrived(part, at(key)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return isinstance(found, list | tuple) and list(value) == list(found)
    return value == found or str(value) == str(found).removeprefix("torch.")
