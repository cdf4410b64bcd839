"""The program of every rank: compose -> typed config -> preflight -> prepare -> fit."""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe.compose import load_config, parse_config_args, to_yaml
from sft_recipe.config import Config
from sft_recipe.errors import CheckpointError, ConfigError, PreflightError, RecipeError

if TYPE_CHECKING:
    from sft_recipe.training.prepare import Prepared
    from sft_recipe.training.trainer import SFTTrainer


def main(args: list[str]) -> int:
    """Run one rank. Returns the exit code: 0 done, 2 an error that the message explains, 75 stopped and saved."""
    try:
        return run(args)
    except RecipeError as error:
        if os.environ.get("SFT_DEBUG"):
            raise
        from sft_recipe.training.prepare import speaks_for_machine

        if speaks_for_machine():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def run(args: list[str]) -> int:
    """Raises RecipeError for whatever a user can cause."""
    config_args = [text for text in args if text.startswith("-")]
    config = load_config([text for text in args if text not in config_args], **parse_config_args(config_args))
    config = _with_launched_ranks(config)
    device = _device(config)
    _check_machine(config, device)
    _quieten()

    from sft_recipe.training.checkpoint import check_identity, check_room_for_run, find_checkpoint
    from sft_recipe.training.prepare import prepare
    from sft_recipe.training.progress import notice

    output_dir = _writable(Path(config.trainer.output_dir).expanduser())
    checkpoints = output_dir / "checkpoints"
    resume = find_checkpoint(config.trainer.resume_from, checkpoints) if config.trainer.resume_from else None
    check_room_for_run(checkpoints, resume)
    prepared = prepare(config, int(os.environ["LOCAL_RANK"]), say=notice)
    if resume:
        check_identity(resume, prepared.identity(config))

    is_first = os.environ["RANK"] == "0"
    if is_first:
        (output_dir / "config.yaml").write_text(to_yaml(config))
        if config.trainer.resume_from and resume is None:
            notice(f"--resume_from auto found no checkpoint in {checkpoints}: training starts from the beginning.")
    return _train(config, prepared, device, resume)


def _train(config: Config, prepared: "Prepared", device: str, resume: Path | None) -> int:
    _join_process_group(device)
    import torch

    from sft_recipe.training.prepare import leave_meeting_place
    from sft_recipe.training.progress import banner
    from sft_recipe.training.trainer import SFTTrainer

    try:
        trainer = SFTTrainer(config, prepared, device, resume)
        if torch.distributed.get_rank() == 0:
            banner("Supervised fine-tuning", _banner(config, prepared, device, trainer, resume))
        code = trainer.fit()
        torch.distributed.barrier()
        if os.environ["LOCAL_RANK"] == "0":
            leave_meeting_place()
        return code
    finally:
        torch.distributed.destroy_process_group()


def _with_launched_ranks(config: Config) -> Config:
    """Under torchrun its numbers count, whoever called it; alone, this process is the only rank."""
    trainer = config.trainer
    if "WORLD_SIZE" in os.environ:
        local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ["WORLD_SIZE"])
        changes = {"n_gpus_per_node": local, "nnodes": max(1, world // local)}
        return config.model_copy(update={"trainer": trainer.model_copy(update=changes)})
    if trainer.world_size > 1:
        raise ConfigError(
            f"trainer.n_gpus_per_node={trainer.n_gpus_per_node} and trainer.nnodes={trainer.nnodes} need "
            f"{trainer.world_size} processes, and this is one: start with ./train.sh, or with "
            f"torchrun --nproc_per_node={trainer.n_gpus_per_node} -m sft_recipe.main_sft ..."
        )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", str(trainer.master_port or _free_port()))
    return config


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _device(config: Config) -> str:
    import torch

    asked = config.trainer.device
    there = torch.cuda.device_count() if asked != "cpu" else 0
    if there == 0 and asked == "cuda":
        raise PreflightError("trainer.device=cuda, but PyTorch sees no GPU here; set it to auto or cpu")
    if 0 < there < config.trainer.n_gpus_per_node:
        raise PreflightError(
            f"{config.trainer.n_gpus_per_node} GPUs are asked for (N_GPUS), but this machine has {there}; "
            f"ask for {there}, or train on the CPU with trainer.device=cpu"
        )
    return "cuda" if there else "cpu"


def _check_machine(config: Config, device: str) -> None:
    from importlib.util import find_spec

    data, fsdp = config.data, config.fsdp
    ranks = config.trainer.world_size // fsdp.ulysses_sequence_parallel_size
    if config.trainer.world_size % fsdp.ulysses_sequence_parallel_size:
        raise ConfigError(
            f"fsdp.ulysses_sequence_parallel_size={fsdp.ulysses_sequence_parallel_size} does not divide "
            f"the {config.trainer.world_size} ranks"
        )
    if data.train_batch_size < ranks:
        raise ConfigError(
            f"BATCH_SIZE={data.train_batch_size} is smaller than the number of ranks ({ranks}): some would have nothing "
            f"to train; set BATCH_SIZE to {ranks} or more"
        )
    if fsdp.strategy == "megatron":
        missing = [name for name in ("megatron.core", "mbridge") if not _is_installed(name, find_spec)]
        problems = [f"{name} is not installed (pip install -e '.[megatron]')" for name in missing]
        problems += ["there is no GPU"] if device == "cpu" else []
        if problems:
            raise PreflightError(f"strategy=megatron cannot run here: {' and '.join(problems)}; use fsdp or fsdp2")
    for name in [*config.trainer.logger, *(["wandb"] if config.trainer.wandb_project else [])]:
        if name != "console" and not _is_installed(name, find_spec):
            raise PreflightError(f"trainer.logger names {name}, which is not installed: pip install {name}")


def _is_installed(name: str, find_spec) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _writable(folder: Path) -> Path:
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"the output folder {folder} cannot be written: {error.strerror or error}") from None
    return folder


def _join_process_group(device: str) -> None:
    import torch

    if device == "cpu":
        from sft_recipe.engine.platform_cpu import use_cpu

        use_cpu()
        torch.distributed.init_process_group("gloo")
    else:
        from verl.utils.distributed import initialize_global_process_group

        initialize_global_process_group()


def _quieten() -> None:
    """Warnings of libraries about themselves hide what matters here; SFT_DEBUG=1 shows them."""
    if os.environ.get("SFT_DEBUG"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    if os.environ["LOCAL_RANK"] != "0" or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")


def _banner(
    config: Config, prepared: "Prepared", device: str, trainer: "SFTTrainer", resume: Path | None
) -> list[tuple[str, str]]:
    import torch

    from sft_recipe.engine.verl_config import compute_dtype, effective_strategy, uses_gradient_checkpointing

    data, train, facts = config.data, prepared.train, trainer.facts()
    ranks = config.trainer.world_size
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    strategy = effective_strategy(config.fsdp, device)
    if strategy != config.fsdp.strategy:
        strategy += f" ({config.fsdp.strategy} does not run on a CPU)"
    dtype = compute_dtype(config.fsdp, device)
    share = 100 * facts["trainable"] / facts["parameters"]
    lora = f", LoRA rank {config.lora.rank}, alpha {config.lora.alpha:g}" if config.lora.enabled else ""
    supervised = 100 * train.supervised / int(train.lengths.sum())
    checkpointing = "on" if uses_gradient_checkpointing(config, device) else "off"
    rows = [
        ("device", f"{machine}; {ranks} rank{'s' * (ranks > 1)}, {strategy}, {dtype}, gradient checkpointing {checkpointing}"),
        ("model", prepared.model.name),
        ("parameters", f"{facts['trainable']:,} trainable of {facts['parameters']:,} ({share:.2f}%){lora}"),
        ("data", f"{len(train):,} examples, {int(train.lengths.sum()):,} tokens, {supervised:.0f}% of them supervised"),
        ("batches", f"{data.train_batch_size} examples a step over all ranks; micro-batches of up to {data.token_budget:,} tokens"),
        ("steps", f"{trainer.total_steps:,} ({trainer.steps_per_epoch:,} an epoch), learning rate {config.optim.lr:g} {config.optim.lr_scheduler_type}"),
        ("output", str(Path(config.trainer.output_dir))),
    ]
    if prepared.validation:
        rows.insert(4, ("validation", f"{len(prepared.validation):,} examples"))
    if resume:
        rows.append(("resumed", f"{resume}, at step {trainer.resume_global_step} of {trainer.total_steps}"))
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
