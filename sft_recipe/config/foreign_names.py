"""What other projects call our keys, in their configurations and on their command lines.

This module uses only the standard library, so that --help works before the first installation.
"""

# Those of transformers' TrainingArguments, and what LLaMA-Factory and TRL add in the same words.
TRAINING_ARGUMENTS = {
    "model_name_or_path": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "gradient_checkpointing": "model.enable_gradient_checkpointing",
    "attn_implementation": "model.attn_implementation",
    "use_liger_kernel": "model.use_liger",
    "torch_compile": "fsdp.use_torch_compile",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.lr_scheduler_type",
    "warmup_ratio": "optim.lr_warmup_steps_ratio",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip_grad",
    "num_train_epochs": "trainer.total_epochs",
    "output_dir": "trainer.output_dir",
    "save_total_limit": "trainer.max_ckpt_to_keep",
    "logging_steps": "trainer.log_freq",
    "run_name": "trainer.run_name",
    "seed": "trainer.seed",
}
LLAMAFACTORY = {
    "cutoff_len": "data.max_length",
    "preprocessing_num_workers": "data.num_workers",
    "enable_thinking": "data.enable_thinking",
    "enable_liger_kernel": "model.use_liger",
}
TRL = {"max_length": "data.max_length"}

# The optimizers of transformers' TrainingArguments, and of axolotl and LLaMA-Factory: optim.optimizer, and
# optim.optimizer_impl.
TORCH, BITSANDBYTES = "torch.optim", "bitsandbytes.optim"
OPTIMIZERS = {
    "adamw_torch": ("AdamW", TORCH),
    "adamw_torch_fused": ("AdamW", TORCH),
    "adamw_hf": ("AdamW", TORCH),
    "sgd": ("SGD", TORCH),
    "adagrad": ("Adagrad", TORCH),
    "rmsprop": ("RMSprop", TORCH),
    "adamw_8bit": ("AdamW8bit", BITSANDBYTES),
    "adamw_bnb_8bit": ("AdamW8bit", BITSANDBYTES),
    "paged_adamw_8bit": ("PagedAdamW8bit", BITSANDBYTES),
    "paged_adamw_32bit": ("PagedAdamW32bit", BITSANDBYTES),
    "lion_8bit": ("Lion8bit", BITSANDBYTES),
    "lion_32bit": ("Lion32bit", BITSANDBYTES),
    "paged_lion_8bit": ("PagedLion8bit", BITSANDBYTES),
    "paged_lion_32bit": ("PagedLion32bit", BITSANDBYTES),
    "ademamix": ("AdEMAMix", BITSANDBYTES),
    "ademamix_8bit": ("AdEMAMix8bit", BITSANDBYTES),
    "paged_ademamix_8bit": ("PagedAdEMAMix8bit", BITSANDBYTES),
    "paged_ademamix_32bit": ("PagedAdEMAMix32bit", BITSANDBYTES),
}


def optimizer_overrides(name: str) -> tuple[str, ...]:
    """Return the overrides for one of OPTIMIZERS; none for AdamW, the default."""
    optimizer, implementation = OPTIMIZERS[name]
    if implementation != TORCH:
        return f"optim.optimizer={optimizer}", f"optim.optimizer_impl={implementation}"
    return (f"optim.optimizer={optimizer}",) if optimizer != "AdamW" else ()


def find_optimizer(name: str) -> str | None:
    """Return the name in OPTIMIZERS of an optimizer that was written as other projects do, or as its class."""
    if name.lower() in OPTIMIZERS:
        return name.lower()
    classes = {optimizer.lower(): foreign for foreign, (optimizer, _) in reversed(OPTIMIZERS.items())}
    return classes.get(name.lower())
