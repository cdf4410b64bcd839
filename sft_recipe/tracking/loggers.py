"""verl's loggers, such as TensorBoard and Weights & Biases: checked before the run, and created for it."""

import os
from typing import Any

from sft_recipe.config.preflight import is_installed
from sft_recipe.config.schema import Config
from sft_recipe.config.validation import nearest
from sft_recipe.errors import ConfigError, PreflightError


def check_loggers(config: Config) -> None:
    """Raise ConfigError for a logger that verl does not have, PreflightError for one that is not installed."""
    if not _names(config):
        return
    from verl.utils.tracking import Tracking

    for name in _names(config):
        if name not in Tracking.supported_backend:
            known = ", ".join(Tracking.supported_backend)
            hint = nearest(name, Tracking.supported_backend)
            raise ConfigError(f"trainer.logger has the unknown logger {name}; known are {known}.{hint}")
        if name != "file" and not is_installed(name):
            raise PreflightError(f"trainer.logger names {name}, which is not installed: pip install {name}")


def create_loggers(config: Config) -> Any:
    """Return verl's Tracking for the loggers of the configuration, or None where there are none."""
    trainer, names = config.trainer, _names(config)
    if not names:
        return None
    from verl.utils.tracking import Tracking

    if "tensorboard" in names:
        os.environ.setdefault("TENSORBOARD_DIR", str(trainer.run_folder / "tensorboard"))
    return Tracking(
        project_name=trainer.wandb_project or trainer.project_name,
        experiment_name=trainer.experiment_name or trainer.run_folder.absolute().name,
        default_backend=names,
        config=config.public(),
    )


def _names(config: Config) -> list[str]:
    """All loggers but the console, which is ours; a project for Weights & Biases implies its logger."""
    names = [name for name in config.trainer.logger if name != "console"]
    return [*names, "wandb"] if config.trainer.wandb_project and "wandb" not in names else names
