"""Reads the configuration that a run has written into its folder, and compares another one with it."""

from pathlib import Path
from typing import Any

import yaml

from sft_recipe.config.schema import Config
from sft_recipe.errors import CheckpointError, first_line

FILE = "config.yaml"
COMPARED = ("model", "optim", "fsdp", "lora")  # of the data, checkpoints hold what must be equal
PATHS = ("path", "tokenizer_path", "fallback", "chat_template")


def read_run_config(run: Path) -> dict[str, Any]:
    """Return the configuration in a run folder, as plain values. Raises CheckpointError where it cannot be read."""
    path = run / FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a run writes it beside metrics.jsonl") from None
    except (
        OSError,
        ValueError,
        RecursionError,
        LookupError,
        AttributeError,
        yaml.YAMLError,
    ) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not the configuration of a run: it has no groups such as optim")
    return config


def changed_settings(checkpoint: Path, config: Config) -> list[str]:
    """Return what `config` changes of model, optimizer and sharding of the run that saved `checkpoint` in its folder:
    ["optim.lr=0.001 (before: 2e-05)"].

    The list is empty where the configuration in the run folder cannot be read.
    """
    try:
        before = read_run_config(checkpoint.resolve().parent.parent)
    except CheckpointError:
        return []
    now = config.public()
    return [
        f"{group}.{key}={value} (before: {before[group][key]})"
        for group in COMPARED
        for key, value in now[group].items()
        if isinstance(before.get(group), dict)
        and key not in PATHS
        and key in before[group]
        and before[group][key] != value
    ]
