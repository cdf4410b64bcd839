"""Reads the overrides of verl's SFT trainers, of its older layout and of the present one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipe.config.importing.imported import Imported, is_our_key

# verl's defaults that differ from ours.
DEFAULTS: dict[str, Any] = {
    "optim.lr": 1e-5,
    "optim.betas": [0.9, 0.95],
    "data.train_batch_size": 256,
    "data.micro_batch_size_per_gpu": 4,
    "data.max_length": 1024,
    "data.truncation": "error",
    "trainer.total_epochs": 4,
    "trainer.seed": 1,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
}
GPUS = "trainer.n_gpus_per_node"
RENAMED = {
    "model.partial_pretrain": "model.path",
    "data.micro_batch_size": "data.micro_batch_size_per_gpu",
    "data.messages_key": "data.columns.messages",
    "data.multiturn.messages_key": "data.columns.messages",
    "data.multiturn.tools_key": "data.columns.tools",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
    "trainer.default_local_dir": "trainer.output_dir",
    "model.strategy": "fsdp.strategy",
    "engine.strategy": "fsdp.strategy",
    "optim.lr_scheduler": "optim.lr_scheduler_type",
    "optim.warmup_steps_ratio": "optim.lr_warmup_steps_ratio",
    "ulysses_sequence_parallel_size": "fsdp.ulysses_sequence_parallel_size",
    "engine.ulysses_sequence_parallel_size": "fsdp.ulysses_sequence_parallel_size",
    "model.lora_alpha": "lora.alpha",
    "model.target_modules": "lora.target_modules",
    "model.fsdp_config.model_dtype": "fsdp.model_dtype",
    "trainer.experiment_name": "trainer.run_name",
    "--nproc_per_node": GPUS,
    "--nnodes": "trainer.nnodes",
}
# What always holds here, or has no effect on the model: verl compiles the computation of an entropy, which is not used.
IGNORED: tuple[str, ...] = (
    "use_remove_padding",
    "data.multiturn.enable",
    "model.use_remove_padding",
    "data.balance_dp_token",
)
IGNORED += ("data.pad_mode", "engine.use_torch_compile", "model.fsdp_config.offload_params", "trainer.default_hdfs_dir")


def read_verl(given: Mapping[str, Any], path: Path, gpus: int | None) -> Imported:
    """Return the overrides for dotted keys {name: value}; `gpus`, unless None, replaces their number of GPUs."""
    imported = Imported({name.lstrip("+"): value for name, value in given.items()})
    imported.values |= DEFAULTS
    columns: dict[str, str] = {}
    for name in list(imported.given):
        if (value := imported.get(name)) is None or name in IGNORED:
            continue
        key = RENAMED.get(name, name)
        if name in ("data.prompt_key", "data.response_key"):
            columns[name.removeprefix("data.").removesuffix("_key")] = value
        elif key.startswith("data.columns."):
            columns[key.removeprefix("data.columns.")] = value
        elif key == GPUS and gpus:
            if value != gpus:
                imported.skip(name, value, f"--gpus {gpus} replaces it")
        elif (name, value) == ("trainer.resume_mode", "auto"):
            imported.values["trainer.resume_from"] = "auto"
        elif name.endswith("_dict_keys"):
            imported.skip(name, value, "columns inside another column cannot be named; write prompt and response")
        elif name == "model.lora_rank":
            if value:
                imported.values["lora.enabled"] = True
                imported.set("lora.rank", value, name)
        elif key.startswith("engine.") and is_our_key(f"fsdp.{key.removeprefix('engine.')}"):
            imported.set(f"fsdp.{key.removeprefix('engine.')}", value, name)
        elif is_our_key(key):
            imported.set(key, [value] if key == "trainer.logger" and isinstance(value, str) else value, name)
        else:
            imported.skip(name, value, "no counterpart")
    if gpus:
        imported.set(GPUS, gpus, "--gpus")
    if any(name.endswith("_dict_keys") and value for name, value in imported.given.items()):
        columns = {}
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    if columns:
        imported.set("data.columns", columns, "data.prompt_key")
    if not imported.values.get("lora.enabled"):
        imported.values = {key: value for key, value in imported.values.items() if not key.startswith("lora.")}
    return imported
