"""Reads the configuration that a run has written into its folder."""

from pathlib import Path
from typing import Any

import yaml

from sft_recipe.errors import CheckpointError

FILE = "config.yaml"


def read_run_config(run: Path) -> dict[str, Any]:
    """Return the configuration in a run folder, as plain values. Raises CheckpointError where it cannot be read."""
    path = run / FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a run writes it beside metrics.jsonl") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not the configuration of a run: it has no groups such as optim")
    return config
