"""Defines the keys of the optimizer and of the learning-rate schedule."""

import math
from typing import Any

from pydantic import Field

from sft_recipe.config import values
from sft_recipe.config.group import Group, flag


class OptimConfig(Group):
    """This group sets the optimizer and the learning-rate schedule."""

    optimizer: str = Field("AdamW", description="class name in optimizer_impl")
    optimizer_impl: str = Field(
        "torch.optim",
        description="module of the class: torch.optim; bitsandbytes.optim (AdamW8bit, PagedAdamW8bit, ...) on one rank",
    )
    override_optimizer_config: dict[str, Any] | None = Field(
        None, description="further arguments of the class, e.g. {eps: 1.0e-6}"
    )
    lr: float = Field(
        2e-5,
        gt=0,
        allow_inf_nan=False,
        description="peak learning rate; 2e-4 with LoRA unless set",
        json_schema_extra=flag("learning_rate", "lr") | {"yaml": "${if_else:${lora.enabled},2.0e-4,2.0e-5}"},
    )
    lr_scheduler_type: values.SchedulerType = Field(
        "cosine",
        description="schedule with its peak at lr: cosine, linear, constant, onecycle, wsd, inverse_sqrt, polynomial",
    )
    lr_warmup_steps_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="fraction of all steps in which the learning rate rises from 0 to lr; not of onecycle",
        json_schema_extra=flag("warmup_ratio"),
    )
    lr_warmup_steps: int = Field(-1, description="warmup steps; if above 0, used instead of the ratio and of pct_start")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="final learning rate of cosine, linear, polynomial, wsd, as a fraction of lr"
    )
    lr_decay_steps_ratio: float = Field(
        0.1, ge=0, le=1, description="wsd: fraction of all steps in which the learning rate falls, at the end"
    )
    power: float = Field(1.0, gt=0, allow_inf_nan=False, description="polynomial: exponent of the fraction left")
    pct_start: float = Field(0.3, ge=0, le=1, description="onecycle: fraction of all steps in which the rate rises")
    div_factor: float = Field(25.0, gt=0, allow_inf_nan=False, description="onecycle: it starts at lr / div_factor")
    final_div_factor: float = Field(
        1e4, gt=0, allow_inf_nan=False, description="onecycle: it ends at lr / div_factor / final_div_factor"
    )
    zero_indexed_step: bool = Field(
        True, description="false: the first step counts as step 1 of the schedule, so that a warmup starts above 0"
    )
    betas: values.Betas = Field((0.9, 0.999), description="decay rates of Adam's moments")
    weight_decay: float = Field(
        0.01,
        ge=0,
        allow_inf_nan=False,
        description="decoupled weight decay, as in AdamW",
        json_schema_extra=flag("weight_decay"),
    )
    clip_grad: float | None = Field(
        1.0,
        ge=0,
        description="maximum global gradient norm; 0 or null: no clipping",
        json_schema_extra=flag("grad_clip"),
    )

    @property
    def max_grad_norm(self) -> float:
        """`clip_grad` as a limit: infinity where gradients are not clipped."""
        return self.clip_grad or math.inf
