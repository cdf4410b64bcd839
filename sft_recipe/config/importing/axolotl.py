"""Reads a training YAML of axolotl."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipe.config.importing.datasets import HUB_NAME, SHAREGPT, Files, hub_name, is_name
from sft_recipe.config.importing.imported import Imported, with_defaults
from sft_recipe.config.importing.transformers_args import IGNORED, read_lora, read_training
from sft_recipe.errors import ConfigError

DEFAULTS: dict[str, Any] = {
    "sequence_len": 512,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "lr_scheduler": "cosine",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
WARMUP = 0.03  # of the steps, where a file leaves it out
LIGER = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu")  # not those for the loss
FORMATS = re.compile(r"alpaca(:\w+)?|chat_template(\.\w+)?|sharegpt.*|chatml.*|llama3.*|None")
# The settings of a data set that are read, or have no effect on the examples.
DATASET = {"path", "type", "name", "split", "data_files", "ds_type", "field_messages", "message_property_mappings"}
DATASET |= {"message_field_role", "message_field_content", "roles", "preprocess_shards"}
USUAL = {"roles_to_train": (["assistant"], ["gpt"]), "train_on_eos": ("turn",), "chat_template": ("tokenizer_default",)}
FSDP = {
    "offload_params": "fsdp.offload_policy",
    "fsdp_offload_params": "fsdp.offload_policy",
    "reshard_after_forward": "fsdp.reshard_after_forward",
}


def read_axolotl(given: Mapping[str, Any], path: Path, gpus: int | None) -> Imported:
    """Return the overrides for a configuration. Raises ConfigError where it is not supervised fine-tuning."""
    if given.get("rl"):
        raise ConfigError(f"{path}: rl is {given['rl']}; only supervised fine-tuning can be imported")
    imported = Imported(with_defaults(DEFAULTS, given))
    imported.map(
        {
            "base_model": "model.path",
            "sequence_len": "data.max_length",
            "lr_scheduler": "optim.lr_scheduler_type",
            "num_epochs": "trainer.total_epochs",
            "resume_from_checkpoint": "trainer.resume_from",
            "wandb_project": "trainer.wandb_project",
            "tokenizer_config": "model.tokenizer_path",
            "early_stopping_patience": "trainer.early_stopping.patience",
        }
    )
    _liger(imported)
    read_training(imported, gpus, "micro_batch_size", "optimizer")
    if given.get("warmup_steps") is None and given.get("warmup_ratio") is None:
        imported.values["optim.lr_warmup_steps_ratio"] = WARMUP
        imported.skip("warmup_steps", "left out", f"there {WARMUP:.0%} of the steps, at most 100; here {WARMUP:.0%}")
    for name, key in (("saves_per_epoch", "trainer.save_freq"), ("evals_per_epoch", "trainer.test_freq")):
        count = imported.get(name)
        if count == 1:
            imported.set(key, "after_each_epoch", name)
        elif count:
            imported.skip(name, count, f"{key} is a number of steps, or after_each_epoch")
    _adapter(imported)
    _parallel(imported)
    template = imported.get("chat_template")
    if template and template != "tokenizer_default":
        imported.skip("chat_template", template, "the model's own is used; model.chat_template=FILE for another")
    size = imported.get("val_set_size", 0)
    if isinstance(size, int | float) and 0 < size < 1:
        imported.set("data.val_ratio", size, "val_set_size")
    elif size:
        imported.skip("val_set_size", size, "data.val_ratio is a fraction")
    for name, key in (("datasets", "data.train_files"), ("test_datasets", "data.val_files")):
        files = Files(imported)
        datasets = imported.get(name, [])
        for number, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
            _add(files, dataset if isinstance(dataset, dict) else {"path": dataset}, f"{name}[{number}]")
        files.write(key, name)
    imported.finish(lambda name: IGNORED.fullmatch(name) is not None)
    return imported


def _liger(imported: Imported) -> None:
    if any(imported.get(name) for name in LIGER):
        imported.set("model.use_liger", True, "liger_rope")
    plugins = imported.given.get("plugins") or []
    if all("liger" in str(name) for name in (plugins if isinstance(plugins, list) else [plugins])):
        imported.get("plugins")


def _adapter(imported: Imported) -> None:
    adapter = imported.get("adapter")
    named = imported.get("lora_target_modules")
    targets = "all-linear" if imported.get("lora_target_linear") else named
    rank, alpha = imported.get("lora_r", 8), imported.get("lora_alpha")
    if adapter in ("lora", "qlora"):
        read_lora(imported, rank, alpha, targets)
        if imported.get("load_in_4bit") or adapter == "qlora":
            imported.values["lora.quantize"] = True
    elif adapter:
        imported.skip("adapter", adapter, "lora and qlora are supported")
    if imported.get("load_in_8bit"):
        imported.skip("load_in_8bit", True, "a base model is quantized to 4 bits, or not at all")


def _parallel(imported: Imported) -> None:
    if imported.get("context_parallel_size", 1) != 1:
        imported.set(
            "fsdp.ulysses_sequence_parallel_size", imported.get("context_parallel_size"), "context_parallel_size"
        )
    config = imported.get("fsdp_config", {})
    if imported.get("fsdp_version") == 2 or (isinstance(config, dict) and str(config.get("fsdp_version")) == "2"):
        imported.set("fsdp.strategy", "fsdp2", "fsdp_version")
        for name, value in config.items() if isinstance(config, dict) else ():
            if name in FSDP and value:
                imported.values[FSDP[name]] = value
    imported.get("fsdp")  # FSDP is used anyway
    if imported.get("deepspeed"):
        imported.skip("deepspeed", imported.get("deepspeed"), "FSDP is used; see fsdp.* in docs/configuration.md")


def _add(files: Files, dataset: dict[str, Any], place: str) -> None:
    name, kind, data_files = dataset.get("path"), dataset.get("type"), dataset.get("data_files")
    if not is_name(name):
        files.imported.skip(place, dataset, "its path is not the name of a file or of a data set of the hub")
        return
    if isinstance(kind, dict) or not FORMATS.fullmatch(str(kind)):
        files.imported.skip(f"dataset {name}, type", kind, "the format is detected for each record; see data.columns")
    elif str(kind).startswith("alpaca"):
        files.imported.skip(f"dataset {name}, type", kind, "there '### Instruction:' lines, here the model's template")
    if data_files and name in ("json", "csv", "parquet"):
        paths = data_files if isinstance(data_files, list) else [data_files]
        if not all(map(is_name, paths)):
            files.imported.skip(f"{place}, data_files", data_files, "it is not a list of file names")
            return
    elif data_files:
        files.imported.skip(f"dataset {name}, data_files", data_files, "the complete data set is read")
        paths = [name]
    elif HUB_NAME.fullmatch(name) and not Path(name).exists():
        paths = [hub_name(name, dataset.get("name"), dataset.get("split"))]
    else:
        paths = [name]
    usual = {key for key, values in USUAL.items() if dataset.get(key) in values}
    files.imported.list_rest(f"dataset {name}", dataset, DATASET | usual)
    columns, roles = _columns(dataset, place, files.imported)
    for path in paths:
        files.add(path, columns, roles)


def _columns(dataset: dict[str, Any], place: str, imported: Imported) -> tuple[dict[str, str], dict[str, str]]:
    columns = {}
    if (field := dataset.get("field_messages")) and field not in ("messages", "conversations"):
        columns["conversations"] = str(field)
    mappings = "message_property_mappings"
    names = dict(imported.mapping(f"{place}, {mappings}", dataset.get(mappings)))
    for ours in ("role", "content"):
        names.setdefault(ours, dataset.get(f"message_field_{ours}", ours))
    if {key: names[key] for key in ("role", "content")} != SHAREGPT:
        columns |= {ours: str(names[ours]) for ours in ("role", "content")}
    roles = {
        str(name): ours
        for ours, given in imported.mapping(f"{place}, roles", dataset.get("roles")).items()
        for name in (given if isinstance(given, list) else [given])
        if ours in ("system", "user", "assistant", "tool") and name != ours
    }
    return columns, roles
