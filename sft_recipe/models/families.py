"""The families of models that can be trained, and what differs between them: one table entry each."""

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from sft_recipe.config.auto import PACKED_ATTENTION
from sft_recipe.config.schema import Config
from sft_recipe.errors import ConfigError, ModelError
from sft_recipe.models.liger import require_liger_support


@dataclass(frozen=True)
class Family:
    """What a family of models is called elsewhere.

    `auto_class` is the class of transformers that builds and loads its models, `mapping` the table of transformers that
    has them by their configuration class, `task_type` peft's name, `engine` the model_type of its engine with verl.
    """

    name: str
    auto_class: str
    mapping: str
    task_type: str
    engine: str

    @property
    def auto(self) -> Any:
        """Return the class of transformers that builds and loads these models."""
        return getattr(transformers, self.auto_class)

    def has(self, config: PretrainedConfig) -> bool:
        """Return whether transformers, or the model's own code, has a model of this family for a configuration."""
        own_code = getattr(config, "auto_map", None) or {}
        return type(config) in getattr(modeling_auto, self.mapping) or self.auto_class in own_code


CAUSAL = Family(
    name="causal language model",
    auto_class="AutoModelForCausalLM",
    mapping="MODEL_FOR_CAUSAL_LM_MAPPING",
    task_type="CAUSAL_LM",
    engine="language_model",
)
SEQ2SEQ = Family(
    name="encoder-decoder model",
    auto_class="AutoModelForSeq2SeqLM",
    mapping="MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    task_type="SEQ_2_SEQ_LM",
    engine="seq2seq_language_model",
)


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of the model that a configuration describes."""
    return SEQ2SEQ if config.is_encoder_decoder else CAUSAL


def decoder_start_token_id(config: PretrainedConfig) -> int | None:
    """Return the token that an encoder-decoder's decoder reads first; None where the configuration names none.

    Where the decoder has a separate configuration, it is the bos token there.
    """
    named = getattr(config, "decoder_start_token_id", None)
    return getattr(getattr(config, "decoder", None), "bos_token_id", None) if named is None else named


def fit(config: Config, hf_config: PretrainedConfig) -> Config:
    """Return the run's configuration with what null and auto mean for the family of its model.

    Raises ConfigError for a setting that does not apply to the family, and ModelError for an encoder-decoder whose
    configuration lacks a token that its decoder needs, and for a model that has no kernels of Liger.
    """
    family = family_of(hf_config)
    if family is CAUSAL:
        if config.data.has_targets:
            raise ConfigError(
                "data.max_target_length is for encoder-decoder models; this model reads prompt and answer as one "
                "sequence, which data.max_length bounds: leave it out"
            )
        if config.model.use_liger:
            require_liger_support(hf_config)
        return config
    for setting, (is_chosen, instead) in _inapplicable(config).items():
        if is_chosen:
            raise ConfigError(f"{setting} does not apply to encoder-decoder models: {instead}")
    pad = getattr(hf_config.get_text_config(decoder=True), "pad_token_id", None)
    for key, token in (("decoder_start_token_id", decoder_start_token_id(hf_config)), ("pad_token_id", pad)):
        if token is None:
            raise ModelError(
                f"{config.model.path}: its config.json has no {key}, which the decoder needs; set it with "
                f"model.override_config={{{key}: NUMBER}}"
            )
    model_class = getattr(modeling_auto, family.mapping).get(type(hf_config), None)
    best = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"  # a private name: engine/patches.py
    attention = config.model.attn_implementation
    model = {"share_prefixes": False, "attn_implementation": best if attention == "auto" else attention}
    length = config.data.max_target_length or config.data.max_length
    data = {"max_target_length": length, "train_on": "last"}
    return config.model_copy(
        update={"model": config.model.model_copy(update=model), "data": config.data.model_copy(update=data)}
    )


def _inapplicable(config: Config) -> dict[str, tuple[bool, str]]:
    """Map settings for causal models to whether they are chosen, and what to do instead."""
    model, fsdp, size = config.model, config.fsdp, config.fsdp.ulysses_sequence_parallel_size
    return {
        "fsdp.strategy=megatron": (fsdp.strategy == "megatron", "use fsdp or fsdp2"),
        f"fsdp.ulysses_sequence_parallel_size={size}": (size > 1, "set it to 1"),
        "lora.quantize=true": (config.lora.quantize, "use --use_lora, with weights in bf16"),
        "model.use_liger=true": (model.use_liger, "set it to false"),
        "model.share_prefixes=true": (model.share_prefixes is True, "leave it at auto"),
        f"model.attn_implementation={PACKED_ATTENTION}": (
            model.attn_implementation == PACKED_ATTENTION,
            "their batches are padded, not packed; use auto, sdpa or eager",
        ),
        "model.router_aux_loss_coef": (bool(model.router_aux_loss_coef), "set it to null"),
        "data.random_system_prompt": (config.data.random_system_prompt > 0, "they have no system turns"),
        "data.drop_empty_thoughts": (config.data.drop_empty_thoughts > 0, "no template writes thoughts for them"),
        "data.thinking_mix": (config.data.thinking_mix is not None, "their answers are trained on as they are"),
        "data.train_on_reasoning=false": (
            not config.data.train_on_reasoning,
            "the whole answer is the target; remove the reasoning from the data",
        ),
    }
