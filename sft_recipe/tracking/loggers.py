"""verl's loggers, such as TensorBoard and Weights & Biases: checked before the run, and created for it."""

import os
from typing import Any

from sft_recipe.config.preflight import is_installed
from sft_recipe.config.schema import Config
from sft_recipe.errors import CheckpointError, PreflightError, first_line
from sft_recipe.tracking import wandb_run

# Of the loggers that would write to the current folder: the variable that names another, and which in the run folder.
FOLDERS = {"TENSORBOARD_DIR": "tensorboard", "SWANLAB_LOG_DIR": "swanlog", "VERL_FILE_LOGGER_ROOT": "."}


def check_loggers(config: Config) -> None:
    """Raise PreflightError for a logger that is not installed, and on rank 0, which logs, without a login for wandb."""
    for name in _names(config):
        if name != "file" and not is_installed(name):
            raise PreflightError(f"trainer.logger names {name}, which is not installed: pip install {name}")
        if name == "wandb" and os.environ.get("RANK", "0") == "0":
            wandb_run.check_login()


def create_loggers(config: Config, is_continued: bool) -> Any:
    """Return verl's Tracking for the loggers of the configuration, or None where there are none.

    Their files are in the run folder. With `is_continued`, wandb continues its run. Raises PreflightError where a
    logger cannot be started, CheckpointError where the run folder cannot be written.
    """
    trainer, names = config.trainer, _names(config)
    if not names:
        return None
    from verl.utils.tracking import Tracking

    folder = trainer.run_folder.absolute()
    for variable, place in FOLDERS.items():
        os.environ.setdefault(variable, str(folder / place))
    if "wandb" in names:
        try:
            wandb_run.prepare_environment(folder, is_continued)
        except OSError as error:
            raise CheckpointError(f"{folder / wandb_run.ID_FILE} cannot be written: {error.strerror}") from None
    try:
        return Tracking(
            project_name=trainer.wandb_project or trainer.project_name,
            experiment_name=trainer.experiment_name or folder.name,
            default_backend=names,
            config=config.public(),
        )
    except Exception as error:  # of many types, depending on the logger
        raise PreflightError(
            f"trainer.logger: {', '.join(names)} cannot be started: {first_line(error)}. Solve that, or leave it out."
        ) from error


def _names(config: Config) -> list[str]:
    """All loggers but the console, which is ours; a project for Weights & Biases implies its logger."""
    names: list[str] = [name for name in config.trainer.logger if name != "console"]
    return [*names, "wandb"] if config.trainer.wandb_project and "wandb" not in names else names
