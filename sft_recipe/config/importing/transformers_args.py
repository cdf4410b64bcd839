"""The settings that LLaMA-Factory, axolotl and TRL share: those of transformers' TrainingArguments, and LoRA's."""

import re
from typing import Any

from sft_recipe.config.foreign_names import OPTIMIZERS, TRAINING_ARGUMENTS, optimizer_overrides
from sft_recipe.config.importing.imported import Imported

# What TrainingArguments has where a file leaves a setting out.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
LOGGERS = ("wandb", "tensorboard", "mlflow", "swanlab", "trackio", "clearml")
# Settings of logging, speed and hardware, and those that always hold here, such as packing.
IGNORED = re.compile(
    r"logging_.*|log_level.*|do_(train|eval)|overwrite_.*|plot_loss|save_only_model|ddp_.*|dataloader_.*|bf16|fp16|tf32"
    r"|remove_unused_columns|per_device_eval_batch_size|eval_accumulation_steps|hub_.*|wandb_.*"
    r"|(eval_)?(sample_)?packing|pad_to_sequence_len|group_by_length|flash_.*|gradient_checkpointing_kwargs|liger_.*"
    r"|torch_compile_(backend|mode)|include_num_input_tokens_seen|load_best_model_at_end|metric_for_best_model|dataset_num_proc"
    r"|disable_tqdm|save_safetensors|strict|model_type|tokenizer_type|dataset_prepared_path|predict_with_generate"
)


PACKED = "there a batch counts packed sequences, here examples; to train as many tokens a step, raise the batch size"
UPLOAD = "scripts/export_model.py --push_to_hub uploads the model, after the run"
NOTED = {"packing": PACKED, "sample_packing": PACKED, "neat_packing": PACKED}
NOTED |= {"push_to_hub": UPLOAD, "hub_model_id": UPLOAD}


def read_training(
    imported: Imported, gpus: int | None, batch: str = "per_device_train_batch_size", optimizer_key: str = "optim"
) -> None:
    """Set what all of them have: rates, batch sizes, epochs, schedule, precision, when to save and to evaluate.

    `gpus` is the number of GPUs of the run, None for one: their batch sizes are those of one GPU.
    """
    gpus = gpus or 1
    imported.map(TRAINING_ARGUMENTS)
    if imported.values.get("model.use_liger") and imported.values.pop("fsdp.use_torch_compile", False):
        imported.skip("torch_compile", True, "model.use_liger fuses the same operations")
    per_device, accumulation = imported.get(batch, 1), imported.get("gradient_accumulation_steps", 1)
    if isinstance(per_device, int) and isinstance(accumulation, int):
        imported.set("data.micro_batch_size_per_gpu", per_device, batch)
        imported.set("data.train_batch_size", per_device * accumulation * gpus, "gradient_accumulation_steps")
    else:
        imported.skip(batch, f"{per_device}, gradient_accumulation_steps: {accumulation}", "set data.train_batch_size")
    imported.set("trainer.n_gpus_per_node", gpus, "--gpus")
    for name, reason in NOTED.items():
        if value := imported.get(name):
            imported.skip(name, value, reason)
    warmup = imported.get("warmup_steps", 0)
    if warmup:
        is_ratio = isinstance(warmup, float) and warmup < 1
        key = "optim.lr_warmup_steps_ratio" if is_ratio else "optim.lr_warmup_steps"
        imported.set(key, warmup, "warmup_steps")
    optimizer = imported.get(optimizer_key, "adamw_torch")
    if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
        imported.values |= dict(text.split("=") for text in optimizer_overrides(optimizer))
    else:
        imported.skip(optimizer_key, optimizer, "AdamW is used; optim.optimizer and optim.optimizer_impl set another")
    max_steps = imported.get("max_steps", -1)
    if isinstance(max_steps, int) and max_steps > 0:
        imported.set("trainer.total_training_steps", max_steps, "max_steps")
    betas = imported.get("adam_beta1", 0.9), imported.get("adam_beta2", 0.999)
    if betas != (0.9, 0.999):
        imported.set("optim.betas", list(betas), "adam_beta2")
    _epsilon(imported)
    _precision(imported)
    _when(imported, "save", "trainer.save_freq")
    _when(imported, "eval", "trainer.test_freq")
    loggers = imported.get("report_to", [])
    named = [name for name in (loggers if isinstance(loggers, list) else [loggers]) if name in LOGGERS]
    if named:
        imported.set("trainer.logger", ["console", *named], "report_to")


def _epsilon(imported: Imported) -> None:
    given = imported.get("adam_epsilon", 1e-8)
    try:
        epsilon = float(given)
    except (TypeError, ValueError):
        imported.skip("adam_epsilon", given, "it is not a number")
        return
    if epsilon != 1e-8:
        imported.set("optim.override_optimizer_config", {"eps": epsilon}, "adam_epsilon")


def _precision(imported: Imported) -> None:
    if imported.get("bf16") in (True, "true"):
        imported.set("fsdp.mixed_precision.param_dtype", "bf16", "bf16")
    if imported.get("fp16") in (True, "true"):
        imported.set("fsdp.mixed_precision.param_dtype", "fp16", "fp16")


def _when(imported: Imported, what: str, key: str) -> None:
    strategy = imported.get(f"{what}_strategy", imported.get(f"{what}uation_strategy"))
    steps = imported.get(f"{what}_steps")
    if strategy == "epoch":
        imported.set(key, "after_each_epoch", f"{what}_strategy")
    elif strategy not in ("no", False) and isinstance(steps, int) and steps >= 1:
        imported.set(key, steps, f"{what}_steps")
    elif steps is not None and strategy not in ("no", False):
        imported.skip(f"{what}_steps", steps, f"{key} is a number of optimizer steps")


def read_lora(imported: Imported, rank: Any, alpha: Any, targets: Any) -> None:
    """Enable LoRA with a rank, an alpha (None: as here) and the modules: "all", a text with commas, a list, or None."""
    imported.values["lora.enabled"] = True
    imported.set("lora.rank", rank, "lora_rank")
    if alpha is not None:
        imported.set("lora.alpha", alpha, "lora_alpha")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        targets = [name.strip() for name in targets.split(",")]
    if targets is None:
        by_type = "there peft chooses by the type of the model, often q_proj and v_proj; here all linear layers"
        imported.skip("lora_target_modules", "left out", by_type)
    elif targets not in ("all", "all-linear", ["all"]):
        imported.set("lora.target_modules", targets, "lora_target")
    if dropout := imported.get("lora_dropout"):
        imported.skip("lora_dropout", dropout, "adapters have no dropout here")
