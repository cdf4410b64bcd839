"""Defines every configuration key once: its type, default, limits, meaning, and the flag that sets it.

scripts/generate_reference.py writes conf/, config.yaml, cli/flags.py and the reference from these definitions.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sft_recipe.config import values
from sft_recipe.config.secrets import without_secrets
from sft_recipe.files import user_path

ALL_LINEAR = "all-linear"


def _flag(name: str, short: str | None = None, shown_default: str | None = None) -> dict[str, Any]:
    """Name the flag of a key; `shown_default` is how --help writes a default that is null."""
    return {"flag": name, "short": short, "shown_default": shown_default}


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())

    _fits_int64 = field_validator("*")(values.fits_int64)


class ModelConfig(_Group):
    """This group selects the model, its tokenizer, and how it computes attention and activations."""

    path: str = Field(
        "Qwen/Qwen2.5-0.5B",
        min_length=1,
        description="hub id, folder, .gguf file, or SmolLM2-135M-Instruct (the embedded model)",
        json_schema_extra=_flag("model_path", "model"),
    )
    fallback: str | None = Field(
        "SmolLM2-135M-Instruct",
        description="used when the default model is neither cached nor reachable; null: stop instead",
    )
    tokenizer_path: str | None = Field(
        None,
        description="hub id or folder of the tokenizer; null: the model's",
        json_schema_extra=_flag("tokenizer_path", shown_default="the model's"),
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


class DataConfig(_Group):
    """This group selects the training data, its supervised tokens, and its batches."""

    train_files: str | list[str] = Field(
        "./data/example_sft.json",
        description="file, glob, hub data set (owner/name), or a list; a*0.5: half of it, a*2: twice, a#9: 9 examples",
        json_schema_extra=_flag("train_data"),
    )
    val_files: str | list[str] | None = Field(
        None,
        description="validation data, written as train_files; null: none",
        json_schema_extra=_flag("val_data", shown_default="none"),
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
    max_length: int = Field(2048, ge=2, description="longest example, in tokens", json_schema_extra=_flag("max_length"))
    truncation: Literal["drop", "right", "error"] = Field(
        "drop", description="examples longer than max_length: drop, right (cut at the end), error"
    )
    train_batch_size: int = Field(
        4, ge=1, description="examples per optimizer step, over all ranks", json_schema_extra=_flag("batch_size")
    )
    micro_batch_size_per_gpu: int = Field(
        1,
        ge=1,
        description="times max_length: the most tokens in one micro-batch; bounds memory",
        json_schema_extra=_flag("micro_batch_size"),
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
        return self

    @property
    def token_budget(self) -> int:
        """The largest number of tokens that one micro-batch may hold."""
        return self.micro_batch_size_per_gpu * self.max_length


class OptimConfig(_Group):
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
        json_schema_extra=_flag("learning_rate", "lr") | {"yaml": "${if_else:${lora.enabled},2.0e-4,2.0e-5}"},
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="schedule after the warmup: cosine, linear, constant"
    )
    lr_warmup_steps_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="fraction of all steps in which the learning rate rises from 0 to lr",
        json_schema_extra=_flag("warmup_ratio"),
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
        json_schema_extra=_flag("weight_decay"),
    )
    clip_grad: float | None = Field(
        1.0,
        ge=0,
        description="maximum global gradient norm; 0 or null: no clipping",
        json_schema_extra=_flag("grad_clip"),
    )

    @property
    def max_grad_norm(self) -> float:
        """`clip_grad` as a limit: infinity where gradients are not clipped."""
        return self.clip_grad or math.inf


class MixedPrecisionConfig(_Group):
    """This group sets the precision of computation and of gradient reduction."""

    param_dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="compute: bf16, fp32; auto: bf16 if the hardware supports it, else fp32"
    )
    reduce_dtype: Literal["bf16", "fp32"] = Field("fp32", description="gradient reduction: bf16, fp32")


class FsdpConfig(_Group):
    """This group sets how the model is distributed over ranks, and its precision."""

    strategy: Literal["fsdp", "fsdp2", "megatron"] = Field(
        "fsdp", description="fsdp, fsdp2, megatron", json_schema_extra=_flag("strategy")
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


class LoraConfig(_Group):
    """This group replaces full fine-tuning by low-rank adapters."""

    enabled: bool = Field(
        False,
        description="train low-rank adapters; the model's weights stay frozen",
        json_schema_extra=_flag("use_lora"),
    )
    rank: int = Field(8, ge=1, description="inner dimension of the adapters", json_schema_extra=_flag("lora_rank"))
    alpha: float = Field(
        16,
        gt=0,
        allow_inf_nan=False,
        description="the update is scaled by alpha / rank",
        json_schema_extra=_flag("lora_alpha"),
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
        False, description="save the merged model as well as the adapter", json_schema_extra=_flag("merge_lora")
    )

    @model_validator(mode="after")
    def _check_merge(self) -> "LoraConfig":
        if self.merge and not self.enabled:
            raise ValueError("merge is set but LoRA is not enabled; add --use_lora")
        return self


class TrainerConfig(_Group):
    """This group sets the length of the run, its output, and its machines."""

    total_epochs: int = Field(
        3, ge=1, description="passes over the training data", json_schema_extra=_flag("num_epochs", "epochs")
    )
    total_training_steps: int | None = Field(
        None, ge=1, description="optimizer steps; if set, used instead of total_epochs"
    )
    output_dir: str = Field(
        "./outputs",
        min_length=1,
        description="run folder: config.yaml, metrics.jsonl, checkpoints/step_N",
        json_schema_extra=_flag("output_dir"),
    )
    resume_from: str | None = Field(
        None,
        description="a checkpoint folder, or auto: the newest complete checkpoint in output_dir; null: a new run",
        json_schema_extra=_flag("resume_from", shown_default="none"),
    )
    save_freq: values.StepInterval = Field(
        values.AFTER_EACH_EPOCH,
        description="optimizer steps between checkpoints, or after_each_epoch; -1: only at the end",
    )
    test_freq: values.StepInterval = Field(
        values.AFTER_EACH_EPOCH,
        description="optimizer steps between validations, or after_each_epoch; -1: only at the end",
    )
    max_ckpt_to_keep: int | None = Field(
        2, ge=1, description="newest checkpoints to keep, besides the best and the one resumed from; null: all"
    )
    async_save: bool = Field(
        True, description="write checkpoints while training continues, from a copy in host memory if it fits"
    )
    max_time: float | None = Field(
        None, gt=0, description="seconds after the launch at which the run saves and exits with 75; null: no limit"
    )
    auto_restart: int = Field(
        0,
        ge=0,
        description="restarts of a failed run, each from its newest checkpoint",
        json_schema_extra=_flag("auto_restart"),
    )
    heartbeat_timeout: float | None = Field(
        1800, gt=0, description="seconds without progress after which a rank is considered hung; null: never"
    )
    logger: list[values.Logger] = Field(
        ["console"], description="console, and verl's: wandb, tensorboard, mlflow, swanlab, trackio, clearml, ..."
    )
    project_name: str = Field("sft_recipe", description="project name for the loggers")
    experiment_name: str | None = Field(None, description="run name for the loggers; null: the output folder's name")
    wandb_project: str | None = Field(
        None,
        description="if set, log to wandb under this project as well",
        json_schema_extra=_flag("wandb_project", shown_default="none"),
    )
    seed: int = Field(42, ge=0, description="seed of data order, LoRA initialization, dropout and the validation split")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: cuda if there is a GPU, else cpu")
    n_gpus_per_node: int = Field(
        1, ge=1, description="ranks on this machine; CPU ranks if there is no GPU", json_schema_extra=_flag("n_gpus")
    )
    nnodes: int = Field(1, ge=1, description="machines", json_schema_extra=_flag("nnodes"))
    node_rank: int = Field(0, ge=0, description="this machine's number, from 0", json_schema_extra=_flag("node_rank"))
    master_addr: str = Field("localhost", description="address of machine 0", json_schema_extra=_flag("master_addr"))
    master_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port of machine 0; null: a free one on one machine, 29500 on several",
        json_schema_extra=_flag("master_port", shown_default="free"),
    )

    @model_validator(mode="after")
    def _check_nodes(self) -> "TrainerConfig":
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank is {self.node_rank}; with nnodes={self.nnodes} it ends at {self.nnodes - 1}")
        if self.nnodes > 1 and self.master_addr == "localhost":
            raise ValueError("several machines need master_addr, the address of machine 0, the same on all of them")
        return self

    @property
    def run_folder(self) -> Path:
        """`output_dir`, in which ~ is expanded."""
        return user_path(self.output_dir)

    @property
    def world_size(self) -> int:
        """The number of ranks on all machines."""
        return self.n_gpus_per_node * self.nnodes


class Config(_Group):
    """The complete configuration of a run, validated and immutable."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    fsdp: FsdpConfig
    lora: LoraConfig
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig.model_validate({}))

    def public(self) -> dict[str, Any]:
        """Return the configuration as plain values without secrets of the environment, for files and loggers."""
        return without_secrets(self.model_dump(mode="json"))

    def cache_dir(self) -> Path:
        """Return the folder that holds token stores and converted models between runs."""
        if self.data.cache_dir:
            return user_path(self.data.cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_recipe"
