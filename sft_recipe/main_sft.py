"""The program of every rank: compose -> typed config -> preflight -> prepare -> fit."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from sft_recipe import timing
from sft_recipe.distributed.processes import die_with_parent
from sft_recipe.distributed.rendezvous import (
    is_error_reporter,
    is_single_process,
    record_exit,
    recorded_exit,
    remove_rendezvous_dir,
)
from sft_recipe.engine.import_stubs import UNUSED, quick_imports
from sft_recipe.errors import ConfigError, RecipeError, TrainingError, is_debugging

with quick_imports():
    from sft_recipe.config.compose import load_config, parse_config_args, to_yaml
    from sft_recipe.config.schema import Config

if TYPE_CHECKING:
    from sft_recipe.distributed.watchdog import Watchdog


def main(args: list[str]) -> int:
    """Run one rank. Returns the exit code: 0 done, 2 an error that the message explains, 75 stopped and saved."""
    if (ended := recorded_exit()) is not None:
        return ended
    try:
        code = run(args)
    except RecipeError as error:
        code = error.exit_code
        if is_debugging():
            record_exit(code)
            raise
        if is_error_reporter():
            print(f"error: {error}", file=sys.stderr, flush=True)
    if code and not is_single_process():
        record_exit(code)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        remove_rendezvous_dir()
    return code


def run(args: list[str]) -> int:
    """Raises RecipeError for whatever a user can cause."""
    config_args = [text for text in args if text.startswith("-")]
    config = load_config([text for text in args if text not in config_args], **parse_config_args(config_args))
    config = _with_launched_ranks(config)
    timing.mark("configuration")
    with quick_imports():
        from sft_recipe.distributed.watchdog import Watchdog

    timing.mark("import PyTorch")
    watch = Watchdog(int(os.environ["RANK"]), config.trainer.world_size, config.trainer.heartbeat_timeout)
    with watch.propagate_failures(), ExitStack() as held:
        return _run(config, watch, held)


def _run(config: Config, watch: Watchdog, held: ExitStack) -> int:
    is_first, local_rank = os.environ["RANK"] == "0", int(os.environ["LOCAL_RANK"])

    with quick_imports():
        _silence_libraries(local_rank)
        from sft_recipe.checkpoint.manager import check_identity, check_run_folder_is_free, find_checkpoint
        from sft_recipe.checkpoint.run_lock import FolderLock
        from sft_recipe.config import preflight
        from sft_recipe.data.run_inputs import prepare
        from sft_recipe.tracking.run_log import check_loggers, notice

    timing.mark("import transformers")
    device = preflight.choose_device(config)
    preflight.check(config, device)
    check_loggers(config)
    output_dir = preflight.writable_folder(config.trainer.run_folder)
    checkpoints, resume = output_dir / "checkpoints", None
    if is_first:  # the folder is shared: one of all ranks looks into it, and the others hear of it below
        held.callback(FolderLock(output_dir).release)
        resume = find_checkpoint(config.trainer.resume_from, checkpoints, _is_restart(), notice)
        check_run_folder_is_free(checkpoints, resume)
    timing.mark("checks")
    watch.set_phase("preparing model and data", limited=False)
    prepared = prepare(config, local_rank, say=notice)
    timing.mark("model and data")
    if is_first:
        preflight.write(output_dir / "config.yaml", to_yaml(config))
    with quick_imports(() if config.fsdp.strategy == "megatron" else UNUSED):
        _choose_platform(device)

        import torch

        from sft_recipe.distributed.consistency import check_consistency, share_checkpoint
        from sft_recipe.engine.loss import LOGITS_CHUNK
        from sft_recipe.models.memory_estimate import resolve_activation_checkpointing
        from sft_recipe.models.stats import model_stats
        from sft_recipe.tracking.run_log import banner
        from sft_recipe.training.trainer import SFTTrainer

    timing.mark("import verl")
    watch.set_phase("waiting for the other ranks", limited=False)
    _join_process_group(device)
    timing.mark("process group")
    try:
        check_consistency(config, prepared.identity(config), output_dir)
        resume = share_checkpoint(resume, checkpoints)
        if resume:
            check_identity(resume, prepared.identity(config))
        timing.mark("agreement")
        watch.set_phase("loading the model", limited=False)
        stats = model_stats(config, prepared.model, device)
        longest = int(prepared.train.lengths.max())
        config, memory = resolve_activation_checkpointing(
            config, stats, longest, device, LOGITS_CHUNK[device], notice if is_first else _no_op
        )
        timing.mark("model's shape")
        trainer = SFTTrainer(config, prepared, device, stats, resume, watch)
        timing.mark("model and optimizer")
        if is_first:
            steps = trainer.steps_per_epoch, trainer.total_steps, trainer.resume_global_step
            banner(config, prepared, device, stats, memory, *steps)
        timing.mark("banner")
        code = trainer.fit()
        torch.distributed.barrier()
    except torch.OutOfMemoryError:
        raise TrainingError(_memory_advice(config)) from None
    finally:
        # After an error on one of several ranks the others may never come; leaving the process is what frees them.
        if sys.exc_info()[0] is None or config.trainer.world_size == 1:
            torch.distributed.destroy_process_group()
    return code


def _no_op(_text: str) -> None:
    """Of ranks that leave it to rank 0."""


def _is_restart() -> bool:
    """Whether torchrun started the ranks again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _memory_advice(config: Config) -> str:
    return (
        f"out of GPU memory. In this order: MICRO_BATCH_SIZE=1 (now {config.data.micro_batch_size_per_gpu}), a smaller "
        f"MAX_LENGTH (now {config.data.max_length}), --use_lora, more GPUs (N_GPUS), fsdp=fsdp_offload. A checkpoint "
        "saved before is whole: --resume_from auto goes on from it."
    )


def _with_launched_ranks(config: Config) -> Config:
    """Under torchrun its numbers count, whoever called it; alone, this process is the only rank."""
    trainer = config.trainer
    if all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
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
    os.environ.setdefault("MASTER_PORT", str(trainer.master_port or 0))  # 0: the store chooses a free port
    return config


def _silence_libraries(local_rank: int) -> None:
    """Warnings of libraries about themselves hide what matters here; SFT_DEBUG=1 shows them."""
    if is_debugging():
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    if local_rank != 0 or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")


def _choose_platform(device: str) -> None:
    """Before the first import of verl's engine, which settles verl's platform."""
    if device == "cpu":
        from sft_recipe.engine.cpu.platform import use_cpu

        use_cpu()
    else:
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _join_process_group(device: str) -> None:
    """As verl would, over a store that a restart does not confuse; verl's worker takes the group that it finds."""
    import torch

    from sft_recipe.distributed.watchdog import COLLECTIVE_TIMEOUT, open_store

    store = open_store("process group")
    store.set_timeout(COLLECTIVE_TIMEOUT)  # machines may prepare their data for hours
    torch.distributed.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=COLLECTIVE_TIMEOUT,
    )


def start(args: list[str], launcher: int | None) -> NoReturn:
    """The life of a rank's process, which ends with that of `launcher`, its parent, if any."""
    timing.import_timings()
    if launcher:
        die_with_parent(launcher)  # ranks without their launcher would train on unseen
    # Until training begins, and listens to signals itself, there is nothing to save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: os._exit(128 + number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    code = main(args)
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may hang in a collective with this one, and would keep it from leaving in order; and threads of
    # PyTorch's, which outlive the interpreter, now and then abort a process whose work is done.
    os._exit(code)


if __name__ == "__main__":
    start(sys.argv[1:], os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
