"""verl's loggers, such as TensorBoard and Weights & Biases: checked before the run, and created for it."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from sft_recipe.config.preflight import is_installed
from sft_recipe.config.schema import Config
from sft_recipe.errors import CheckpointError, PreflightError, first_line, pip_install
from sft_recipe.tracking import wandb_run

# Of the loggers that would write to the current folder: the variable that names another, and which in the run folder.
FOLDERS = {"TENSORBOARD_DIR": "tensorboard", "SWANLAB_LOG_DIR": "swanlog", "VERL_FILE_LOGGER_ROOT": "."}
# Of the loggers whose package has another name: what is imported, and what pip installs.
PACKAGES = {
    "vemlp_wandb": ("volcengine_ml_platform", "volcengine-ml-platform"),
    "rl_insight": ("rl_insight", "rl-insight"),
}


def check_loggers(config: Config) -> None:
    """Raise PreflightError for a logger that is not installed, and on rank 0, which logs, without a login for wandb."""
    for name in _names(config):
        module, package = PACKAGES.get(name, (name, name))
        if name != "file" and not is_installed(module):
            raise PreflightError(f"trainer.logger names {name}, which is not installed: {pip_install(package)}")
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

    folder, project = trainer.run_folder.absolute(), trainer.wandb_project or trainer.project_name
    for variable, place in FOLDERS.items():
        os.environ.setdefault(variable, str(folder / place))
    if "wandb" in names:
        try:
            wandb_run.prepare_environment(folder, is_continued)
        except OSError as error:
            raise CheckpointError(f"{folder / wandb_run.ID_FILE} cannot be written: {error.strerror}") from None
    try:
        if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
            _prepare_mlflow(folder, project)
        tracking = Tracking(
            project_name=project,
            experiment_name=trainer.name,
            default_backend=names,
            config=config.public(),
        )
    except Exception as error:  # of many types, depending on the logger
        raise PreflightError(
            f"trainer.logger: {', '.join(names)} cannot be started: {first_line(error)}. Solve that, or leave it out."
        ) from error
    if missing := sorted(set(names) - tracking.logger.keys()):  # verl goes on without mlflow after a warning
        raise PreflightError(f"trainer.logger: {', '.join(missing)} cannot be started; a warning above says why")
    return tracking


def _prepare_mlflow(folder: Path, project: str) -> None:
    """A database in the run folder, with the files of the runs beside it. Raises what mlflow raises."""
    mlflow = import_module("mlflow")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    if mlflow.get_experiment_by_name(project) is None:
        mlflow.create_experiment(project, artifact_location=(folder / "mlartifacts").as_uri())


def _names(config: Config) -> list[str]:
    """All loggers but the console, which is ours; a project for Weights & Biases implies its logger."""
    names: list[str] = [name for name in config.trainer.logger if name != "console"]
    return [*names, "wandb"] if config.trainer.wandb_project and "wandb" not in names else names
