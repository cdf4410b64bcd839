"""Translates the configuration into verl's dataclasses; the only module that knows verl's keys."""

from dataclasses import dataclass, field
from typing import Any

from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from sft_recipe.config.auto import (
    attention,
    compute_dtype,
    effective_strategy,
    reshards_after_forward,
    uses_gradient_checkpointing,
)
from sft_recipe.config.optim import OptimConfig
from sft_recipe.config.optimizer import further_arguments, is_of_bitsandbytes
from sft_recipe.config.schema import Config, FsdpConfig
from sft_recipe.engine import patches
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.resolve import ResolvedModel


@dataclass
class ScheduledOptimizerConfig(FSDPOptimizerConfig):
    """verl's optimizer config, with the schedule of engine/lr_schedule.py in place of verl's own."""

    schedule: OptimConfig | None = None


@dataclass
class ModelConfig(HFModelConfig):
    """verl's model config, with the weights that do not train, whether linear layers have theirs in 4 bits, and where
    the inputs of recomputed layers are kept.

    verl's own enable_activation_offload finds tensors again by their address, and takes those of equal address for one.
    """

    quantize: bool = False
    freeze: list[str] = field(default_factory=list)
    train_only: list[str] = field(default_factory=list)
    offloads_layer_inputs: bool = False


@dataclass(frozen=True)
class VerlConfig:
    """Holds the configurations that verl's TrainingWorker takes."""

    model: HFModelConfig
    engine: Any
    optim: Any
    checkpoint: CheckpointConfig


def build_verl_config(config: Config, model: ResolvedModel, total_steps: int, device: str) -> VerlConfig:
    """Translate; `device` is "cuda" or "cpu", `total_steps` the number of optimizer steps of the run.

    Raises ModelError and ConfigError where the model's configuration cannot be read, or not as the user asks.
    """
    is_megatron = config.fsdp.strategy == "megatron"
    return VerlConfig(
        model=_model(config, model, device),
        engine=megatron_engine(config.fsdp, config.trainer.seed) if is_megatron else fsdp_engine(config, device),
        optim=_megatron_optim(config, total_steps) if is_megatron else _optim(config, total_steps),
        checkpoint=CheckpointConfig(save_contents=["model", "optimizer", "extra", "hf_model"]),
    )


def fsdp_engine(config: Config, device: str) -> FSDPEngineConfig:
    """Return the settings of verl's FSDP engine; on a CPU offloading is off."""
    fsdp = config.fsdp
    on_gpu = device == "cuda"
    return FSDPEngineConfig(
        strategy=effective_strategy(fsdp, device),
        param_offload=fsdp.param_offload and on_gpu,
        optimizer_offload=fsdp.optimizer_offload and on_gpu,
        offload_policy=fsdp.offload_policy and on_gpu,
        reshard_after_forward=reshards_after_forward(config, not on_gpu),
        fsdp_size=fsdp.fsdp_size,
        forward_prefetch=fsdp.forward_prefetch,
        use_no_sync_for_gradient_accumulation=fsdp.use_no_sync_for_gradient_accumulation,
        model_dtype=fsdp.model_dtype,
        mixed_precision={
            "param_dtype": compute_dtype(fsdp, device),
            "reduce_dtype": fsdp.mixed_precision.reduce_dtype,
            "buffer_dtype": "fp32",
        },
        # Encoder-decoders may have weights for images, which are frozen.
        use_orig_params=config.lora.enabled
        or config.model.is_partly_frozen
        or config.data.has_targets
        or is_of_bitsandbytes(config.optim)
        or fsdp.use_torch_compile,  # which needs the weights by themselves
        ulysses_sequence_parallel_size=fsdp.ulysses_sequence_parallel_size,
        use_torch_compile=fsdp.use_torch_compile,
        seed=config.trainer.seed,
    )


def megatron_engine(fsdp: FsdpConfig, seed: int) -> Any:
    """Return the settings of verl's Megatron engine."""
    from verl.workers.config import McoreEngineConfig

    return McoreEngineConfig(
        param_offload=fsdp.param_offload,
        optimizer_offload=fsdp.optimizer_offload,
        tensor_model_parallel_size=fsdp.tensor_model_parallel_size,
        pipeline_model_parallel_size=fsdp.pipeline_model_parallel_size,
        context_parallel_size=fsdp.context_parallel_size,
        seed=seed,
    )


def _model(config: Config, model: ResolvedModel, device: str) -> HFModelConfig:
    lora = config.lora
    built = ModelConfig(
        path=str(model.folder),
        load_tokenizer=config.fsdp.strategy == "megatron",  # only that engine needs its padding token
        trust_remote_code=config.model.trust_remote_code,
        enable_gradient_checkpointing=uses_gradient_checkpointing(config, device),
        use_remove_padding=True,
        use_liger=config.model.use_liger,
        override_config={"attn_implementation": attention(config, device)},
        lora_rank=lora.rank if lora.enabled else 0,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # verl passes it on to peft, which takes a float
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,  # type: ignore[arg-type]  # and a list here
        quantize=lora.quantize,
        freeze=config.model.freeze,
        train_only=config.model.train_only,
        offloads_layer_inputs=config.model.enable_activation_offload and device == "cuda",
        lora={"rank": lora.rank, "alpha": lora.alpha} if lora.enabled else {},
    )
    built.hf_config = load_hf_config(config.model, model)
    patches.set_attention_implementation(built.hf_config, attention(config, device))
    return built


def _optim(config: Config, total_steps: int) -> ScheduledOptimizerConfig:
    optim = config.optim
    return ScheduledOptimizerConfig(
        optimizer=optim.optimizer,
        optimizer_impl=optim.optimizer_impl,
        override_optimizer_config=further_arguments(optim),
        lr=optim.lr,
        schedule=optim,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip_grad=optim.max_grad_norm,
        total_training_steps=total_steps,
    )


def _megatron_optim(config: Config, total_steps: int) -> Any:
    from verl.workers.config import McoreOptimizerConfig

    optim = config.optim
    return McoreOptimizerConfig(
        lr=optim.lr,
        lr_decay_style=optim.lr_scheduler_type,
        min_lr=optim.lr * optim.min_lr_ratio,
        lr_warmup_steps_ratio=optim.lr_warmup_steps_ratio,
        lr_warmup_steps=optim.lr_warmup_steps,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip_grad=optim.max_grad_norm,
        total_training_steps=total_steps,
    )
