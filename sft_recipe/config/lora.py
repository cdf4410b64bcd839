"""Defines the keys of the group `lora`, as schema.py does for the others."""

from pydantic import Field, model_validator

from sft_recipe.config import values
from sft_recipe.config.group import Group, flag

ALL_LINEAR = "all-linear"


class LoraConfig(Group):
    """This group replaces full fine-tuning by low-rank adapters."""

    enabled: bool = Field(
        False,
        description="train low-rank adapters; the model's weights stay frozen",
        json_schema_extra=flag("use_lora") | {"yaml": "${lora.quantize}"},
    )
    quantize: bool = Field(
        False,
        description="LoRA over weights in 4 bits (NF4, bitsandbytes)",
        json_schema_extra=flag("use_qlora"),
    )
    rank: int = Field(8, ge=1, description="inner dimension of the adapters", json_schema_extra=flag("lora_rank"))
    alpha: float = Field(
        16,
        gt=0,
        allow_inf_nan=False,
        description="the update is scaled by alpha / rank",
        json_schema_extra=flag("lora_alpha"),
    )
    target_modules: values.TargetModules = Field(
        ALL_LINEAR,
        description="all-linear; or a list of module names such as [q_proj, v_proj], or one regular expression that "
        "matches complete names",
    )
    exclude_modules: values.ExcludedModules = Field(
        None, description="modules to leave out, written as target_modules; null: none"
    )
    merge: bool = Field(
        False, description="save the merged model as well as the adapter", json_schema_extra=flag("merge_lora")
    )

    @model_validator(mode="after")
    def _check_enabled(self) -> "LoraConfig":
        if self.merge and not self.enabled:
            raise ValueError("merge is set but LoRA is not enabled; add --use_lora")
        if self.quantize and not self.enabled:
            raise ValueError("quantize is set (--use_qlora) but LoRA is switched off; remove enabled=false")
        return self
