"""verl's loggers, such as TensorBoard and Weights & Biases: checked before the run, and created for it."""

import os
from typing import Any

from sft_recipe.config.preflight import is_installed
from sft_recipe.config.schema import Config
from sft_recipe.errors import PreflightError


def check_loggers(config: Config) -> None:
    """Raise PreflightError for a logger that is not installed."""
    for name in _names(config):
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
    names: list[str] = [name for name in config.trainer.logger if name != "console"]
    return [*names, "wandb"] if config.trainer.wandb_project and "wandb" not in names else names
