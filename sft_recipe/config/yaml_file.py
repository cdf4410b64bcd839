"""Reads one file of the configuration, without composing it."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft_recipe.config.hydra_errors import explain_value
from sft_recipe.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a file; references are not resolved. Raises ConfigError."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path} cannot be read: {explain_value(error)}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).strip()}") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read: a value refers to itself, or is nested too deeply") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} cannot be used: it contains a list, not keys")
    return {str(key): value for key, value in loaded.items()}
