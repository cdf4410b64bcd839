"""Defines every configuration key once: its type, default, limits, meaning, and the flag that sets it.

scripts/generate_reference.py writes conf/, config.yaml, cli/flags.py and the reference from these definitions.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sft_recipe.config import values
from sft_recipe.config.group import Group, flag
from sft_recipe.config.secrets import without_secrets
from sft_recipe.config.trainer import (
    GENERATION_METRICS,
    VALIDATION_METRICS,
    EarlyStoppingConfig,
    EvalConfig,
    TrainerConfig,
)
from sft_recipe.files import user_path

ALL_LINEAR = "all-linear"


class ModelConfig(Group):
    """This group selects the model, its tokenizer, and how it computes attention and activations."""

    path: str = Field(
        "Qwen/Qwen2.5-0.5B",
        min_length=1,
        description="hub id, folder, .gguf file, or SmolLM2-135M-Instruct (the embedded model)",
        json_schema_extra=flag("model_path", "model"),
    )
    fallback: str | None = Field(
        "SmolLM2-135M-Instruct",
        description="used when the default model is neither cached nor reachable; null: stop instead",
    )
    tokenizer_path: str | None = Field(
        None,
        description="hub id or folder of the tokenizer; null: the model's",
        json_schema_extra=flag("tokenizer_path", shown_default="the model's"),
    )
    chat_template: str | None = Field(
        None, description="file with a Jinja chat template, saved with the model; null: the tokenizer's"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    enable_gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="recompute activations in the backward pass: true, false, auto (if memory requires it)"
    )
    attn_implementation: str = Field(
        "auto",
        description="auto: flash_attention_2 if installed on a GPU, else sft_packed; or sdpa, eager, ...",
    )
    share_prefixes: bool | Literal["auto"] = Field(
        "auto",
        description="compute a common prefix of documents in a micro-batch once: true, false, auto (true on CPUs)",
    )
    verify_first_step: bool = Field(True, description="compare the first loss with that of plain transformers")
    override_config: dict[str, Any] = Field(
        {}, description="values for the model's own config, e.g. {attention_dropout: 0.1}"
    )


class DataConfig(Group):
    """This group selects the training data, its supervised tokens, and its batches."""

    train_files: str | list[str] = Field(
        "./data/example_sft.json",
        description="file, glob, hub data set (owner/name), or a list; a*0.5: half of it, a*2: twice, a#9: 9 examples",
        json_schema_extra=flag("train_data"),
    )
    val_files: str | list[str] | dict[str, str | list[str]] | None = Field(
        None,
        description="validation data, written as train_files, or several named sets {zh: ..., en: ...}; null: none",
        json_schema_extra=flag("val_data", shown_default="none"),
    )
    val_ratio: float = Field(
        0.0, ge=0.0, lt=1.0, description="fraction of train_files held out for validation, seeded; 0: none"
    )
    format: Literal[
        "auto",
        "preference",
        "messages",
        "conversations",
        "prompt_response",
        "prompt_completion",
        "query_response",
        "alpaca",
    ] = Field(
        "auto",
        description="auto: detected for each record; or messages, conversations, prompt_response, prompt_completion, "
        "query_response, alpaca, preference",
    )
    columns: dict[str, str] = Field({}, description="your column names: {prompt: question, response: answer}")
    on_bad_record: Literal["error", "skip"] = Field(
        "error", description="error: an invalid record stops the run; skip: it is left out and counted"
    )
    max_bad_ratio: float = Field(
        0.05, ge=0.0, le=1.0, description="with skip: stop if a larger fraction of the records is invalid"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="supervised assistant turns: all, or the last of each conversation"
    )
    train_on_reasoning: bool = Field(
        True, description="compute the loss on the assistant's reasoning; false: reasoning is context only"
    )
    enable_thinking: bool | None = Field(
        None, description="the template's enable_thinking switch: true, false; null: the template's default"
    )
    parse_special_tokens: bool = Field(
        False, description="true: text such as <|im_end|> in the data becomes the special token"
    )
    max_length: int = Field(2048, ge=2, description="longest example, in tokens", json_schema_extra=flag("max_length"))
    truncation: Literal["drop", "right", "error"] = Field(
        "drop", description="examples longer than max_length: drop, right (cut at the end), error"
    )
    train_batch_size: int = Field(
        4, ge=1, description="examples per optimizer step, over all ranks", json_schema_extra=flag("batch_size")
    )
    micro_batch_size_per_gpu: int = Field(
        1,
        ge=1,
        description="times max_length: the most tokens in one micro-batch; bounds memory",
        json_schema_extra=flag("micro_batch_size"),
    )
    shuffle: bool = Field(True, description="new seeded order in each epoch; false: the order of the files")
    num_workers: int | None = Field(None, ge=1, description="processes that tokenize; null: one per usable core")
    cache_dir: str | None = Field(
        None, description="folder of token stores and converted models; null: ~/.cache/sft_recipe"
    )

    @model_validator(mode="after")
    def _check_validation_source(self) -> "DataConfig":
        if self.val_files and self.val_ratio:
            raise ValueError("val_files and val_ratio are both set; set only one of them")
        names = self.val_files if isinstance(self.val_files, dict) else {}
        if wrong := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
            raise ValueError(f"val_files: {wrong[0]!r} is no name of a set; use letters, digits, - and _")
        return self

    @property
    def token_budget(self) -> int:
        """The largest number of tokens that one micro-batch may hold."""
        return self.micro_batch_size_per_gpu * self.max_length


class OptimConfig(Group):
    """This group sets the optimizer and the learning-rate schedule."""

    optimizer: str = Field("AdamW", description="class name in optimizer_impl")
    optimizer_impl: str = Field(
        "torch.optim", description="module of the class: torch.optim, torchao.optim, bitsandbytes.optim"
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
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="schedule after the warmup: cosine, linear, constant"
    )
    lr_warmup_steps_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="fraction of all steps in which the learning rate rises from 0 to lr",
        json_schema_extra=flag("warmup_ratio"),
    )
    lr_warmup_steps: int = Field(-1, description="warmup steps; if above 0, used instead of the ratio")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="final learning rate of cosine and linear, as a fraction of lr"
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


class MixedPrecisionConfig(Group):
    """This group sets the precision of computation and of gradient reduction."""

    param_dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="compute: bf16, fp32; auto: bf16 if the hardware supports it, else fp32"
    )
    reduce_dtype: Literal["bf16", "fp32"] = Field("fp32", description="gradient reduction: bf16, fp32")


class FsdpConfig(Group):
    """This group sets how the model is distributed over ranks, and its precision."""

    strategy: Literal["fsdp", "fsdp2", "megatron"] = Field(
        "fsdp", description="fsdp, fsdp2, megatron", json_schema_extra=flag("strategy")
    )
    param_offload: bool = Field(False, description="keep parameters in CPU memory between steps")
    optimizer_offload: bool = Field(False, description="keep the optimizer state in CPU memory between steps")
    offload_policy: bool = Field(
        False, description="fsdp2: keep parameters, gradients and optimizer state in CPU memory during steps"
    )
    reshard_after_forward: bool | Literal["auto"] = Field(
        "auto",
        description="true: free gathered parameters after each pass (ZeRO-3); false: after the step; "
        "auto: true on several GPUs and with offload_policy",
    )
    fsdp_size: int = Field(-1, description="ranks per shard group; -1: all")
    forward_prefetch: bool = Field(False, description="gather the next layer's parameters early")
    use_no_sync_for_gradient_accumulation: bool = Field(
        True, description="reduce gradients once per step; false: once per micro-batch, which needs less memory"
    )
    model_dtype: Literal["fp32", "bf16"] = Field("fp32", description="master weights: fp32, bf16")
    mixed_precision: MixedPrecisionConfig = Field(default_factory=lambda: MixedPrecisionConfig.model_validate({}))
    ulysses_sequence_parallel_size: int = Field(
        1, ge=1, description="ranks that share one sequence (needs flash-attn on GPUs)"
    )
    tensor_model_parallel_size: int = Field(1, ge=1, description="megatron only: ranks that share each layer")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="megatron only: ranks that share the layer stack")
    context_parallel_size: int = Field(1, ge=1, description="megatron only: ranks that share one sequence")

    @model_validator(mode="after")
    def _check_strategy(self) -> "FsdpConfig":
        megatron_only = ["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"]
        wrong = [key for key in megatron_only if getattr(self, key) > 1]
        if wrong and self.strategy != "megatron":
            raise ValueError(f"{wrong[0]} is for strategy=megatron; {self.strategy} has no such parallelism")
        if self.fsdp_size == 0 or self.fsdp_size < -1:
            raise ValueError(f"fsdp_size is {self.fsdp_size}; it must be a number of ranks, or -1 for all")
        if self.offload_policy and self.strategy != "fsdp2":
            raise ValueError("offload_policy is for strategy=fsdp2; use param_offload and optimizer_offload")
        if self.ulysses_sequence_parallel_size > 1 and self.strategy == "megatron":
            raise ValueError("ulysses_sequence_parallel_size is for FSDP; megatron has context_parallel_size")
        return self


class LoraConfig(Group):
    """This group replaces full fine-tuning by low-rank adapters."""

    enabled: bool = Field(
        False,
        description="train low-rank adapters; the model's weights stay frozen",
        json_schema_extra=flag("use_lora"),
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
    def _check_merge(self) -> "LoraConfig":
        if self.merge and not self.enabled:
            raise ValueError("merge is set but LoRA is not enabled; add --use_lora")
        return self


class Config(Group):
    """The complete configuration of a run, validated and immutable."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    fsdp: FsdpConfig
    lora: LoraConfig
    eval: EvalConfig = Field(default_factory=lambda: EvalConfig.model_validate({}))
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig.model_validate({}))

    @model_validator(mode="after")
    def _check_metric(self) -> "Config":
        compared, computed = self.trainer.early_stopping, self.evaluation_metrics()
        if compared.metric not in computed and (computed or compared != EarlyStoppingConfig.model_validate({})):
            names = ", ".join(computed) or "none without validation data (--val_data)"
            raise ValueError(
                f"trainer.early_stopping: the metric {compared.metric} is not computed by this run, which has {names}"
            )
        return self

    @model_validator(mode="after")
    def _check_generation(self) -> "Config":
        if self.eval.generate and not (self.data.val_files or self.data.val_ratio):
            raise ValueError("eval.generate answers validation conversations, but there is no validation data")
        is_supported = self.fsdp.strategy != "megatron" and self.fsdp.ulysses_sequence_parallel_size == 1
        if (self.eval.generate or self.eval.prompts) and not is_supported:
            raise ValueError("eval.generate and eval.prompts need FSDP, and fsdp.ulysses_sequence_parallel_size=1")
        return self

    def evaluation_metrics(self) -> list[str]:
        """Return the names of the metrics that evaluations compute, none without validation data."""
        files = self.data.val_files
        sets = [f"{name}/" for name in files] if isinstance(files, dict) else []
        prefixes = ["val/", *(f"val/{name}" for name in sets)] if files or self.data.val_ratio else []
        generated = GENERATION_METRICS if prefixes and self.eval.generate else ()
        losses = [f"{prefix}{metric}" for prefix in prefixes for metric in VALIDATION_METRICS]
        return [*losses, *(f"eval/{metric}" for metric in generated)]

    def public(self) -> dict[str, Any]:
        """Return the configuration as plain values without secrets of the environment, for files and loggers."""
        return without_secrets(self.model_dump(mode="json"))

    def cache_dir(self) -> Path:
        """Return the folder that holds token stores and converted models between runs."""
        if self.data.cache_dir:
            return user_path(self.data.cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_recipe"
