"""Reads the arguments of TRL's SFT: a YAML of `trl sft --config`, or the flags of a command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipe.config.foreign_names import TRL
from sft_recipe.config.importing.datasets import hub_name, is_name
from sft_recipe.config.importing.imported import Imported, with_defaults
from sft_recipe.config.importing.transformers_args import IGNORED, TRAINING_DEFAULTS, read_lora, read_training

DEFAULTS = TRAINING_DEFAULTS | {
    "learning_rate": 2e-5,
    "max_length": 1024,
}
LORA_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}


def read_trl(given: Mapping[str, Any], path: Path, gpus: int | None) -> Imported:
    """Return the overrides for a configuration."""
    defaults = DEFAULTS | (LORA_DEFAULTS if given.get("use_peft") else {})
    unlimited = {"max_length": None} if "max_length" in given and given["max_length"] is None else {}
    imported = Imported(with_defaults(defaults, given) | unlimited)
    is_older = given.get("max_seq_length") is not None and "max_length" not in given
    imported.map({"max_seq_length": "data.max_length"} if is_older else TRL)
    imported.get("max_length")
    read_training(imported, gpus)
    if "data.max_length" in imported.values:
        imported.set("data.truncation", "right", "max_length")  # it cuts
    elif imported.get("max_length") is None:
        imported.skip("max_length", "null", "nothing is cut; set data.max_length to the length of the longest example")
    if imported.get("use_peft"):
        targets = imported.get("lora_target_modules")
        read_lora(imported, imported.get("lora_r"), imported.get("lora_alpha"), targets)
        if imported.get("load_in_4bit"):
            imported.values["lora.quantize"] = True
    if (template := imported.get("chat_template_path")) and str(template).endswith(".jinja"):
        imported.set("model.chat_template", template, "chat_template_path")
    elif template:
        imported.skip("chat_template_path", template, "model.chat_template is a file with Jinja")
    name, config = imported.get("dataset_name"), imported.get("dataset_config")
    train, test = imported.get("dataset_train_split"), imported.get("dataset_test_split", "test")
    if name is not None and not is_name(name):
        imported.skip("dataset_name", name, "it is not a name")
        name = None
    if name:
        imported.set("data.train_files", hub_name(name, config, train), "dataset_name")
    if name and imported.given.get("eval_strategy", "no") not in ("no", False):
        imported.set("data.val_files", hub_name(name, config, test), "dataset_test_split")
    for name, default in (("completion_only_loss", True), ("assistant_only_loss", False)):
        if (only := imported.get(name, default)) is not True:
            imported.skip(name, only, "the loss is on the assistant's turns alone, as with true")
    imported.finish(lambda name: IGNORED.fullmatch(name) is not None)
    return imported
