"""The program of one rank: load config -> validate -> prepare -> join ranks -> build -> fit."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sft_recipe import timing
from sft_recipe.distributed.processes import die_with_parent
from sft_recipe.distributed.rendezvous import (
    attempt,
    is_error_reported,
    is_error_reporter,
    is_single_process,
    record_exit,
    recorded_exit,
    remove_rendezvous_dir,
)
from sft_recipe.distributed.signals import end_at_once
from sft_recipe.errors import packages_required, run_command, silence_libraries

with timing.paused_gc(), packages_required():
    from sft_recipe.config.compose import load_for_rank, to_yaml
    from sft_recipe.config.schema import Config
    from sft_recipe.distributed.process_group import bind_to_launched_ranks, process_group

if TYPE_CHECKING:
    from sft_recipe.data.run_inputs import RunInputs
    from sft_recipe.distributed.watchdog import Watchdog


def main(args: list[str], config: Config | None = None) -> int:
    """Run one rank and return its exit code: 0 done, 2 an error that the message explains, 75 stopped and saved.

    `config` is the configuration that the launcher composed; without it this rank loads or composes it from `args`.
    """
    if (recorded := recorded_exit()) is not None:
        return recorded
    code = run_command(lambda: run(config or load_for_rank(args)), is_error_reporter)
    if code and not is_single_process():
        record_exit(code)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        remove_rendezvous_dir()
    return code


def run(config: Config) -> int:
    """Train with a composed configuration and return the exit code. Raises RecipeError for errors a user can cause."""
    config = bind_to_launched_ranks(config)
    timing.mark("configuration")
    with timing.paused_gc():
        from sft_recipe.distributed.watchdog import Watchdog

    timing.mark("import PyTorch")
    watchdog = Watchdog(int(os.environ["RANK"]), config.trainer.world_size, config.trainer.heartbeat_timeout)
    with watchdog.propagate_failures(), ExitStack() as cleanup:
        return _run(config, watchdog, cleanup)


def _run(config: Config, watchdog: Watchdog, cleanup: ExitStack) -> int:
    is_first, local_rank = os.environ["RANK"] == "0", int(os.environ["LOCAL_RANK"])
    with timing.paused_gc():
        silence_libraries(shows_progress=local_rank == 0 and sys.stderr.isatty())
        from sft_recipe.checkpoint.resume import (
            check_resume_path,
            check_run_folder_is_free,
            find_checkpoint,
            restore_best_link,
            resumed_identity,
        )
        from sft_recipe.checkpoint.run_lock import FolderLock
        from sft_recipe.config import preflight
        from sft_recipe.config.gpus import mps_notice
        from sft_recipe.data.run_inputs import DATE, prepare
        from sft_recipe.distributed.device_errors import explained
        from sft_recipe.models.families import fit
        from sft_recipe.models.hf_config import load_hf_config
        from sft_recipe.tracking.console import notice
        from sft_recipe.tracking.loggers import check_loggers

    timing.mark("import transformers")
    device = preflight.choose_device(config)
    if is_first and device == "cpu" and config.trainer.device == "auto" and (text := mps_notice()):
        notice(text)
    preflight.check(config, device)
    check_loggers(config)
    check_resume_path(config.trainer.resume_from)  # before the run folder is created
    output_dir = preflight.writable_folder(config.trainer.run_folder)
    checkpoints, resume, is_restart = output_dir / "checkpoints", None, attempt() > 0
    if is_first:  # all ranks share the folder, so that one of them looks for a checkpoint and broadcasts it below
        cleanup.callback(FolderLock(output_dir).release)
        restore_best_link(checkpoints)
        resume = find_checkpoint(config.trainer.resume_from, checkpoints, is_restart, notice)
        check_run_folder_is_free(checkpoints, resume)
    timing.mark("checks")

    watchdog.set_phase("preparing model and data", limited=False)
    date = resumed_identity(config.trainer.resume_from, checkpoints, is_restart).get(DATE)
    inputs = prepare(config, local_rank, say=notice, date=date)
    config = fit(config, load_hf_config(config.model, inputs.model))
    timing.mark("model and data")

    with timing.paused_gc():
        from sft_recipe.engine.platform import select_platform

        select_platform(device)
        from sft_recipe.training import trainer as _trainer  # noqa: F401  # verl, before other machines are waited for

    timing.mark("import verl")
    watchdog.set_phase("waiting for the other ranks", limited=False)
    with explained(config), process_group(device, config.trainer.world_size):
        return _train(config, inputs, device, resume, watchdog)


def _train(config: Config, inputs: RunInputs, device: str, resume: Path | None, watchdog: Watchdog) -> int:
    import torch

    from sft_recipe.checkpoint.resume import check_identity
    from sft_recipe.config import preflight
    from sft_recipe.config.run_config import changed_settings
    from sft_recipe.data.statistics import FILE as DATA
    from sft_recipe.distributed.consistency import check_consistency, share_checkpoint
    from sft_recipe.export.generation import read_generation_config
    from sft_recipe.models.memory_estimate import resolve_activation_checkpointing
    from sft_recipe.models.stats import StatsOf
    from sft_recipe.tracking.banner import print_banner, starting_facts
    from sft_recipe.tracking.console import notice
    from sft_recipe.tracking.run_facts import write_facts
    from sft_recipe.training.schedule import workload_of
    from sft_recipe.training.trainer import SFTTrainer

    timing.mark("process group")
    is_first, output_dir = torch.distributed.get_rank() == 0, config.trainer.run_folder
    check_consistency(config, inputs.identity(config), output_dir)
    resume = share_checkpoint(resume, output_dir / "checkpoints")
    if resume:
        check_identity(resume, inputs.identity(config))
    timing.mark("consistency")

    watchdog.set_phase("loading the model", limited=False)
    read_generation_config(inputs.model.folder, notice if is_first else lambda text: None)
    stats_of = StatsOf(inputs.model, device)
    stats = stats_of(config)
    say = notice if is_first else lambda text: None
    if text := inputs.positions_notice(config, stats.positions):
        say(text)
    settings = to_yaml(config)
    if resume and (changed := changed_settings(resume, config)):
        say("Settings that differ from those of the run so far: " + ", ".join(changed))
    config, memory = resolve_activation_checkpointing(config, stats_of, workload_of(config, inputs.train), device, say)
    timing.mark("model statistics")
    trainer = SFTTrainer(config, inputs, device, stats, resume, watchdog)
    timing.mark("model and optimizer")
    if is_first:  # a run that is refused before leaves the files of an earlier one as they were
        preflight.write(output_dir / "config.yaml", settings)
        preflight.write(output_dir / DATA, inputs.statistics(config.data.truncation).to_json())
        write_facts(output_dir, starting_facts(config, inputs.model.name, device, stats, memory))
        if text := trainer.batches.notice():
            say(text)
        schedule = trainer.schedule
        steps = schedule.steps_per_epoch, schedule.total_steps, trainer.resumed_step
        print_banner(config, inputs, device, stats, memory, *steps, trainer.loss_difference)
    timing.mark("banner")
    code = trainer.fit()
    torch.distributed.barrier()
    return code


def start(args: list[str], launcher: int | None, config: Config | None = None) -> NoReturn:
    """Run this process as a rank, from start to exit; it ends when `launcher`, its parent process, ends."""
    timing.import_timings()
    if launcher:
        die_with_parent(launcher)  # without their launcher, ranks would continue unnoticed
    # Before training starts, and handles signals itself, there is nothing to save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_end_before_training, os.getpid()))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    code = main(args, config)
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # An ordinary exit may hang while other ranks wait in a collective, and threads of PyTorch that outlive the
    # interpreter may abort a process whose work is done.
    os._exit(code)


def _end_before_training(rank: int, number: int, _frame: object) -> NoReturn:
    """Processes that the rank has forked inherit this handler, and end without a message.

    So does a rank that torchrun ends because another one has failed, and said why.
    """
    if os.getpid() == rank and not is_error_reported():
        end_at_once(number, "before training started")
    os._exit(128 + number)


if __name__ == "__main__":
    start(sys.argv[1:], os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
