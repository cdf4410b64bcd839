"""Defines the keys of a run: its length, output and machines, and how it is evaluated."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from sft_recipe.config import values
from sft_recipe.config.group import Group, flag
from sft_recipe.files import user_path

GENERATION_METRICS = ("bleu4", "rouge_l", "exact_match", "tool_match", "truncated", "empty")
VALIDATION_METRICS = ("loss", "perplexity", "token_accuracy", "tokens")


class EarlyStoppingConfig(Group):
    """This group ends a run that no longer improves, and says which evaluation is the best."""

    metric: str = Field("val/loss", min_length=1, description="what checkpoints/best and early stopping compare")
    mode: Literal["min", "max"] = Field("min", description="min: lower is better; max: higher is better")
    patience: int | None = Field(
        None, ge=1, description="evaluations without an improvement after which the run stops; null: never"
    )
    min_delta: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="smallest change that is an improvement, in the metric's unit"
    )
    target: float | None = Field(
        None, allow_inf_nan=False, description="stop once the metric is better than this; null: never"
    )


class EvalConfig(Group):
    """This group says what is evaluated, besides the loss on data.val_files."""

    generate: int = Field(0, ge=0, description="validation conversations that are answered at each evaluation")
    prompts: list[str] = Field([], description="further prompts that are answered at each evaluation")
    max_new_tokens: int = Field(256, ge=1, description="longest answer, in tokens")
    limit: int | None = Field(None, ge=1, description="examples of each validation set that are used; null: all")


class TrainerConfig(Group):
    """This group sets the length of the run, its output, and its machines."""

    recipe: str | None = Field(
        None,
        min_length=1,
        description="a recipe of conf/recipe (see --recipes) or a .yaml file, laid over config.yaml; null: none",
        json_schema_extra=flag("recipe", shown_default="none"),
    )
    total_epochs: int = Field(
        3, ge=1, description="passes over the training data", json_schema_extra=flag("num_epochs", "epochs")
    )
    total_training_steps: int | None = Field(
        None, ge=1, description="optimizer steps; if set, used instead of total_epochs"
    )
    output_dir: str = Field(
        "./outputs",
        min_length=1,
        description="run folder: config.yaml, metrics.jsonl, checkpoints/step_N",
        json_schema_extra=flag("output_dir"),
    )
    resume_from: str | None = Field(
        None,
        description="a checkpoint folder, or auto: the newest complete checkpoint in output_dir; null: a new run",
        json_schema_extra=flag("resume_from", shown_default="none"),
    )
    save_freq: values.StepInterval = Field(
        values.AFTER_EACH_EPOCH,
        description="optimizer steps between checkpoints, or after_each_epoch; -1: only at the end",
    )
    test_freq: values.StepInterval = Field(
        values.AFTER_EACH_EPOCH,
        description="steps between evaluations, beside those at step 0 and after epochs; -1: at the end only",
    )
    save_best: bool = Field(True, description="save a checkpoint whenever an evaluation beats all before it")
    early_stopping: EarlyStoppingConfig = Field(default_factory=lambda: EarlyStoppingConfig.model_validate({}))
    max_ckpt_to_keep: int | None = Field(
        2, ge=1, description="newest checkpoints to keep, besides the best and the one resumed from; null: all"
    )
    async_save: bool = Field(
        True, description="write checkpoints while training continues, from a copy in host memory if it fits"
    )
    max_time: float | None = Field(
        None, gt=0, description="seconds after the launch at which the run saves and exits with 75; null: no limit"
    )
    auto_restart: int = Field(
        0,
        ge=0,
        description="restarts of a failed run, each from its newest checkpoint",
        json_schema_extra=flag("auto_restart"),
    )
    start_timeout: float | None = Field(
        600, gt=0, description="seconds to wait for the other machines before the ranks start; null: no limit"
    )
    heartbeat_timeout: float | None = Field(
        1800, gt=0, description="seconds without progress after which a rank is considered hung; null: never"
    )
    log_freq: int = Field(
        1, ge=1, description="steps between lines on the console and in the loggers; files have every step"
    )
    logger: list[values.Logger] = Field(
        ["console"], description="console, and verl's: wandb, tensorboard, mlflow, swanlab, trackio, clearml, ..."
    )
    project_name: str = Field("sft_recipe", description="project name for the loggers")
    run_name: str | None = Field(
        None, min_length=1, description="name of the run in the banner and the loggers; null: the output folder's name"
    )
    wandb_project: str | None = Field(
        None,
        description="if set, log to wandb under this project as well",
        json_schema_extra=flag("wandb_project", shown_default="none"),
    )
    seed: int = Field(42, ge=0, description="seed of data order, LoRA initialization, dropout and the validation split")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: cuda if there is a GPU, else cpu")
    n_gpus_per_node: int = Field(
        1, ge=1, description="ranks on this machine; CPU ranks if there is no GPU", json_schema_extra=flag("n_gpus")
    )
    nnodes: int = Field(1, ge=1, description="machines", json_schema_extra=flag("nnodes"))
    node_rank: int = Field(0, ge=0, description="this machine's number, from 0", json_schema_extra=flag("node_rank"))
    master_addr: str = Field("localhost", description="address of machine 0", json_schema_extra=flag("master_addr"))
    master_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port of machine 0; null: a free one on one machine, 29500 on several",
        json_schema_extra=flag("master_port", shown_default="free"),
    )

    @model_validator(mode="after")
    def _check_nodes(self) -> "TrainerConfig":
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank is {self.node_rank}; with nnodes={self.nnodes} it ends at {self.nnodes - 1}")
        if self.nnodes > 1 and self.master_addr == "localhost":
            raise ValueError("several machines need master_addr, the address of machine 0, the same on all of them")
        return self

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.run_name or self.run_folder.absolute().name

    @property
    def run_folder(self) -> Path:
        """`output_dir`, in which ~ is expanded."""
        return user_path(self.output_dir)

    @property
    def world_size(self) -> int:
        """The number of ranks on all machines."""
        return self.n_gpus_per_node * self.nnodes
