"""Defines every configuration key once: its type, default, limits, meaning, and the flag that sets it.

scripts/generate_reference.py writes conf/, config.yaml, cli/flags.py and the reference from these definitions.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from sft_recipe.config import values
from sft_recipe.config.group import Group, flag
from sft_recipe.config.lora import LoraConfig
from sft_recipe.config.optim import OptimConfig
from sft_recipe.config.secrets import without_secrets
from sft_recipe.config.trainer import (
    GENERATION_METRICS,
    VALIDATION_METRICS,
    EarlyStoppingConfig,
    EvalConfig,
    TrainerConfig,
)
from sft_recipe.files import user_path


class ModelConfig(Group):
    """This group selects the model, its tokenizer, and how it computes attention and activations."""

    path: str = Field(
        "Qwen/Qwen2.5-0.5B",
        min_length=1,
        description="hub id, folder, .gguf, .pth or .bin file, or SmolLM2-135M-Instruct (the embedded model)",
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
    enable_activation_offload: bool = Field(
        False, description="keep the inputs of recomputed layers in CPU memory; with enable_gradient_checkpointing=true"
    )
    attn_implementation: str = Field(
        "auto", description="auto: the best of flash_attention_2, _3, _4 on a GPU, else sft_packed; or sdpa, eager, ..."
    )
    share_prefixes: bool | Literal["auto"] = Field(
        "auto",
        description="compute a common prefix of documents in a micro-batch once: true, false, auto (true on CPUs)",
    )
    use_liger: bool = Field(
        False, description="Liger's kernels for norms, gated MLPs and rotary embeddings; on GPUs, with liger-kernel"
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="coefficient of the loss that balances the experts of a mixture; null: the model's own; 0: none",
    )
    freeze: values.WeightNames = Field(
        [],
        description="weights that do not train: encoder, decoder, embeddings, head, or regular expressions of names",
    )
    train_only: values.WeightNames = Field(
        [], description="the only weights that train, written as freeze, which still applies; []: all"
    )
    verify_first_step: bool = Field(True, description="compare the first loss with that of plain transformers")
    override_config: dict[str, Any] = Field(
        {}, description="values for the model's own config, e.g. {attention_dropout: 0.1}"
    )

    @model_validator(mode="after")
    def _check_offload(self) -> "ModelConfig":
        if self.enable_activation_offload and self.enable_gradient_checkpointing is not True:
            raise ValueError(
                "enable_activation_offload keeps the inputs of recomputed layers in CPU memory; it needs "
                "enable_gradient_checkpointing=true"
            )
        return self

    @property
    def is_partly_frozen(self) -> bool:
        """Whether weights were chosen that do not train."""
        return bool(self.freeze or self.train_only)


class DataConfig(Group):
    """This group selects the training data, its supervised tokens, and its batches."""

    train_files: str | list[str] = Field(
        "./data/example_sft.json",
        description="file, glob, URL, hub data set (owner/name:config:split), or a list; a*0.5: half, a*2: twice, "
        "a#9: 9 examples",
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
        "tokens",
    ] = Field(
        "auto",
        description="auto: detected for each record; or messages, conversations, prompt_response, prompt_completion, "
        "query_response, alpaca, preference, tokens",
    )
    columns: dict[str, str] = Field({}, description="your column names: {prompt: question, response: answer}")
    roles: dict[str, Literal["system", "user", "assistant", "tool", "function_call"]] = Field(
        {}, description="your names of roles: {Human: user, Agent: assistant}; common names are known"
    )
    on_bad_record: Literal["error", "skip"] = Field(
        "error", description="error: an invalid record stops the run; skip: it is left out and counted"
    )
    max_bad_ratio: float = Field(
        0.05, ge=0.0, le=1.0, description="with skip: stop if a larger fraction of the records is invalid"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="supervised assistant turns: all, or the last of each conversation"
    )
    split_turns: bool | Literal["auto"] = Field(
        "auto",
        description="true: one example per assistant turn; auto: false, with a notice where reasoning is dropped",
    )
    train_on_reasoning: bool = Field(
        True, description="compute the loss on the assistant's reasoning; false: reasoning is context only"
    )
    enable_thinking: bool | None = Field(
        None, description="the template's enable_thinking switch: true, false; null: the template's default"
    )
    chat_template_kwargs: values.TemplateVariables = Field(
        {}, description="variables of the chat template: {reasoning_effort: low}; those of a record override them"
    )
    fold_system: bool = Field(
        False, description="put system turns at the start of the next user turn, for templates that have none"
    )
    append_stop_token: bool = Field(
        True,
        description="append the stop token to the last turn where the template ends turns with the next role's marker",
    )
    thinking_mix: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="fraction of the records with reasoning that keep it, seeded; sets the thinking switch; null: all",
    )
    random_system_prompt: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="fraction of the conversations without system turn and tools that get a system prompt, seeded",
    )
    drop_empty_thoughts: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="fraction of the conversations trained without the template's empty <think> blocks, seeded",
    )
    parse_special_tokens: bool = Field(
        False, description="true: text such as <|im_end|> in the data becomes the special token"
    )
    max_length: int = Field(2048, ge=2, description="longest example, in tokens", json_schema_extra=flag("max_length"))
    max_target_length: int | None = Field(
        None,
        ge=1,
        description="encoder-decoder models: longest answer, in tokens, while max_length bounds the source; "
        "null: max_length",
        json_schema_extra=flag("max_target_length", shown_default="max_length"),
    )
    max_chars: int | None = Field(
        None, ge=1, description="cut each message to so many characters before tokenization; null: no cut"
    )
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
    order: values.Order = Field(
        "shuffle", description="shuffle: new seeded order in each epoch; file: the order of the files"
    )
    limit: int | None = Field(
        None, ge=1, description="training examples that are used, the first in the order of the files; null: all"
    )
    num_workers: int | None = Field(None, ge=1, description="processes that tokenize; null: one per usable core")
    cache_dir: str | None = Field(
        None, description="folder of token stores and converted models; null: ~/.cache/sft_recipe"
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> "DataConfig":
        if self.val_files and self.val_ratio:
            raise ValueError("val_files and val_ratio are both set; set only one of them")
        switches = [self.enable_thinking, self.thinking_mix, self.chat_template_kwargs.get("enable_thinking")]
        if sum(switch is not None for switch in switches) > 1:
            raise ValueError(
                "set only one of enable_thinking, thinking_mix, chat_template_kwargs.enable_thinking: each sets it"
            )
        if self.split_turns is True and self.train_on == "last":
            raise ValueError("split_turns makes an example of every assistant turn, train_on=last of one; set only one")
        names = self.val_files if isinstance(self.val_files, dict) else {}
        if wrong := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
            raise ValueError(f"val_files: {wrong[0]!r} is no name of a set; use letters, digits, - and _")
        return self

    @property
    def token_budget(self) -> int:
        """The largest number of tokens that one micro-batch may hold."""
        return self.micro_batch_size_per_gpu * (self.max_length + (self.max_target_length or 0))

    @property
    def has_targets(self) -> bool:
        """Return whether an example is a source and a target, each with its largest length; see families.fit."""
        return self.max_target_length is not None


class MixedPrecisionConfig(Group):
    """This group sets the precision of computation and of gradient reduction."""

    param_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="compute: bf16, fp16, fp32; auto: bf16 if the hardware has it, else fp16 on GPUs, or fp32"
    )
    reduce_dtype: Literal["bf16", "fp32"] = Field("fp32", description="gradient reduction: bf16, fp32")


class FsdpConfig(Group):
    """This group sets how the model is distributed over ranks, and its precision."""

    strategy: Literal["fsdp", "fsdp2", "megatron"] = Field(
        "fsdp",
        description="fsdp, fsdp2, megatron; QLoRA: fsdp2",
        json_schema_extra=flag("strategy") | {"yaml": "${if_else:${lora.quantize},fsdp2,fsdp}"},
    )
    param_offload: bool = Field(False, description="keep parameters in CPU memory between steps")
    optimizer_offload: bool = Field(False, description="keep the optimizer state in CPU memory between steps")
    offload_policy: bool = Field(
        False, description="fsdp2: keep parameters, gradients and optimizer state in CPU memory during steps"
    )
    reshard_after_forward: bool | Literal["auto"] = Field(
        "auto",
        description="true: free gathered parameters after each pass (ZeRO-3); false: after the step; "
        "auto: true on several GPUs, with offload_policy and with LoRA",
    )
    fsdp_size: int = Field(-1, description="ranks per shard group; -1: all")
    forward_prefetch: bool = Field(False, description="gather the next layer's parameters early")
    use_no_sync_for_gradient_accumulation: bool = Field(
        True, description="reduce gradients once per step; false: once per micro-batch, which needs less memory"
    )
    use_torch_compile: bool = Field(False, description="compile the layers with torch.compile, once for all lengths")
    model_dtype: Literal["fp32", "bf16"] = Field("fp32", description="master weights: fp32, bf16")
    mixed_precision: MixedPrecisionConfig = Field(default_factory=lambda: MixedPrecisionConfig.model_validate({}))
    ulysses_sequence_parallel_size: int = Field(
        1, ge=1, description="ranks that share each sequence: for long ones (Ulysses)"
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


class Config(Group):
    """The complete configuration of a run, validated and immutable."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    fsdp: FsdpConfig
    lora: LoraConfig
    eval: EvalConfig = Field(default_factory=lambda: EvalConfig.model_validate({}))
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig.model_validate({}))
    _changes: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _check_frozen(self) -> "Config":
        if self.model.is_partly_frozen and self.lora.enabled:
            raise ValueError(
                "model.freeze and model.train_only are for full fine-tuning: LoRA trains adapters only. Choose their "
                "modules with lora.target_modules and lora.exclude_modules, or remove the keys (model.freeze=[])"
            )
        return self

    @model_validator(mode="after")
    def _check_megatron(self) -> "Config":
        needing_fsdp = {
            "model.enable_activation_offload needs": self.model.enable_activation_offload,
            "model.freeze and model.train_only need": self.model.is_partly_frozen,
            "model.use_liger needs": self.model.use_liger,
            "fsdp.use_torch_compile needs": self.fsdp.use_torch_compile,
        }
        for text, is_set in needing_fsdp.items():
            if is_set and self.fsdp.strategy == "megatron":
                raise ValueError(f"{text} FSDP; use strategy fsdp or fsdp2")
        if self.model.use_liger and self.fsdp.use_torch_compile:
            raise ValueError("model.use_liger and fsdp.use_torch_compile fuse the same operations; set only one")
        return self

    @model_validator(mode="after")
    def _check_quantized(self) -> "Config":
        if self.lora.quantize and self.fsdp.strategy != "fsdp2":
            raise ValueError(f"lora.quantize (--use_qlora) needs strategy fsdp2, not {self.fsdp.strategy}")
        return self

    @model_validator(mode="after")
    def _check_metric(self) -> "Config":
        compared, computed = self.trainer.early_stopping, self.evaluation_metrics()
        if compared.metric not in computed and (computed or compared != EarlyStoppingConfig.model_validate({})):
            names = ", ".join(computed) or "none without validation data (--val_data)"
            is_of_answers = compared.metric.removeprefix("eval/") in GENERATION_METRICS and not self.eval.generate
            remedy = "; eval.generate=8 adds those of answers" if is_of_answers else ""
            problem = f"the metric {compared.metric} is not computed by this run, which has {names}{remedy}"
            raise ValueError(f"trainer.early_stopping: {problem}")
        return self

    @model_validator(mode="after")
    def _check_router_loss(self) -> "Config":
        if self.model.router_aux_loss_coef and self.fsdp.strategy == "megatron":
            raise ValueError("model.router_aux_loss_coef is for FSDP; with Megatron set it to null")
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

    @property
    def changes(self) -> tuple[str, ...]:
        """What the user set on top of a recipe, as overrides; empty without a recipe."""
        return self._changes

    def record_changes(self, changes: Sequence[str]) -> "Config":
        """Record what the user set on top of the recipe; returns this configuration."""
        self._changes = tuple(changes)
        return self

    def public(self) -> dict[str, Any]:
        """Return the configuration as plain values without secrets of the environment, for files and loggers."""
        return without_secrets(self.model_dump(mode="json"))

    def cache_dir(self) -> Path:
        """Return the folder that holds token stores and converted models between runs."""
        if self.data.cache_dir:
            return user_path(self.data.cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_recipe"
