"""Checks of the plan: steps, warm-up, memory of a rank, disk and time of the run."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipe.checkpoint.manager import list_checkpoints
from sft_recipe.checkpoint.manifest import read_manifest
from sft_recipe.config.auto import compute_dtype, uses_gradient_checkpointing
from sft_recipe.config.compose import to_json
from sft_recipe.config.schema import Config
from sft_recipe.display import byte_size
from sft_recipe.engine.lr_schedule import warmup_steps
from sft_recipe.launch.local import HEAP_SETTINGS
from sft_recipe.models.memory_estimate import GIB, estimate_run, options_that_fit
from sft_recipe.models.stats import ModelStats
from sft_recipe.models.workload import Workload, data_ranks
from sft_recipe.readiness.findings import Check, failed, passed, warned
from sft_recipe.readiness.run_folder import existing
from sft_recipe.training.early_stopping import EarlyStopping
from sft_recipe.training.schedule import Schedule, may_save_best

WARM_UP_STEPS = 2  # they start kernels and allocate, and are not counted
MOST_STEPS, ENOUGH_SECONDS = 12, 30.0  # measured steps
POLL_SECONDS = 0.1
FEW_STEPS = 20
STOPPED_REMEDY = "a larger trainer.early_stopping.patience, or another trainer.early_stopping.target"


class Done(NamedTuple):
    """The steps of a run that are trained already, and why it then stopped early, if it did."""

    steps: int = 0
    stopped: str | None = None

    @classmethod
    def before(cls, config: Config, resume: Path | None) -> "Done":
        """Return what a run that resumes from this checkpoint has done; nothing where there is none."""
        if resume is None:
            return cls()
        manifest = read_manifest(resume)
        stopping = EarlyStopping(config.trainer.early_stopping, manifest.get("early_stopping"))
        return cls(manifest["step"], None if manifest.get("unvalidated") else stopping.reason())

    def left(self, schedule: Schedule) -> int:
        """Return the number of steps that remain."""
        return 0 if self.stopped else max(schedule.total_steps - self.steps, 0)


def plan_checks(config: Config, examples: int, tokens: int, done: Done) -> Iterator[Check]:
    """Yield the checks of the number of steps, for a run on `examples` with `tokens` together."""
    schedule = Schedule.from_config(config, examples)
    steps, per_epoch, left = schedule.total_steps, schedule.steps_per_epoch, done.left(schedule)
    longer = (
        "a larger trainer.total_training_steps" if config.trainer.total_training_steps else "more epochs (--epochs)"
    )
    if done.stopped:
        text, remedy = "nothing is left to train: the run stopped early after step {done:,}: {reason}", STOPPED_REMEDY
        yield warned("steps", text, remedy, done=done.steps, reason=done.stopped)
        return
    if not left:
        text = "nothing is left to train: the checkpoint is at step {done:,} of {steps:,}"
        yield warned("steps", text, longer, done=done.steps, steps=steps)
        return
    text = "{steps:# step} ({per_epoch:,} an epoch) of {batch:# example}, {trained:,} tokens in all"
    if done.steps:
        text = "{left:,} of {steps:# step} left ({per_epoch:,} an epoch) of {batch:# example}, {trained:,} tokens"
    found = dict(steps=steps, left=left, per_epoch=per_epoch, batch=config.data.train_batch_size)
    trained = int(tokens * left / per_epoch)
    if steps < FEW_STEPS:
        remedy = longer if done.steps or config.trainer.total_training_steps else longer + ", or a smaller --batch_size"
        yield warned("steps", text, remedy, **found, trained=trained)
    else:
        yield passed("steps", text, **found, trained=trained)
    warmup = warmup_steps(config.optim, steps)
    if warmup >= steps > 1:
        remedy = "--warmup_ratio 0.1 (onecycle: optim.pct_start=0.3) without optim.lr_warmup_steps, or more epochs"
        yield warned(
            "warm-up", "{warmup:# step} of {steps:,}: the learning rate only rises", remedy, warmup=warmup, steps=steps
        )


def memory_checks(
    config: Config,
    stats_of: Callable[[Config], ModelStats],
    workload: Workload,
    device: str,
    memory: int,
) -> Iterator[Check]:
    """Yield the check of a rank's memory on `device` with `memory` bytes."""
    if not data_ranks(config):
        return  # the parallel sizes are an error already
    if stats_of(config).dims is None or config.fsdp.strategy == "megatron":
        yield passed("memory", "no estimate: the model's dimensions are unknown, or Megatron shards it")
        return

    found = estimate_run(config, stats_of(config), workload, device, memory)
    chosen = config.model.enable_gradient_checkpointing
    checkpointing = not found.fits(False) if chosen == "auto" else uses_gradient_checkpointing(config, device)
    values = dict(
        needed=found.needed(checkpointing) / GIB, device=memory / GIB, dtype=compute_dtype(config.fsdp, device),
        state="on" if checkpointing else "off", parts=found.parts(checkpointing),
    )  # fmt: skip
    text = "a rank needs about {needed:.1f} of {device:.1f} GiB ({parts}), in {dtype}, gradient checkpointing {state}"
    if found.fits(checkpointing):
        yield passed("memory", text, **values)
        return
    options = options_that_fit(config, stats_of, workload, device, memory)
    remedy = "what would fit: {options}" if options else "no setting here fits: a smaller model, or more memory"
    kind = failed if found.needed(True) > memory else warned
    yield kind("memory", text, remedy, options="; or ".join(options), **values)


def disk_checks(
    config: Config, stats: ModelStats, schedule: Schedule, done: Done, is_here: bool = True
) -> Iterator[Check]:
    """Yield the check of the disk that checkpoints need besides those that are there; of this machine if `is_here`."""
    trained, trainer = stats.trainable, config.trainer
    state = 3 * 4 * trained  # weights, and two moments of Adam, in fp32
    model = 0 if config.lora.enabled and not config.lora.merge else 4 * stats.total
    folder = trainer.run_folder
    there = len(list_checkpoints(folder / "checkpoints")) if done.steps else 0
    remaining = range(schedule.total_steps - done.left(schedule) + 1, schedule.total_steps + 1)
    sure = {step for step in remaining if schedule.is_due(trainer.save_freq, step)}
    best = {step for step in remaining if may_save_best(config) and schedule.is_evaluation_due(trainer.test_freq, step)}

    def room(saves: int) -> int:
        # Besides those that stay: the best one, the one that the run resumed from, and the one that is being written.
        most = (trainer.max_ckpt_to_keep or there + saves) + 2 + (done.steps > 0)
        return max(min(saves, most - there), 0)

    kept, each = room(len(sure | best)), state + model
    values = dict(kept=kept, each=byte_size(each), needed=byte_size(kept * each))
    text = "up to {kept:# checkpoint} more at a time, of {each}: {needed} are needed"
    if not is_here:
        yield passed("disk", text, **values)
        return
    free = shutil.disk_usage(existing(folder)).free
    text, values = text + ", {free} are free", values | dict(free=byte_size(free))
    if kept * each <= free:
        yield passed("disk", text, **values)
    else:
        kind = failed if room(len(sure)) * each > free else warned
        yield kind("disk", text, "--output_dir on a larger disk, or trainer.max_ckpt_to_keep=1", **values)


def measured(config: Config, examples: int, tokens: int, device: str, done: Done) -> Iterator[Check]:
    """Train a few steps in a temporary folder, and yield the time of what is left of a run on `examples` with `tokens`
    together.
    """
    schedule = Schedule.from_config(config, examples)
    with tempfile.TemporaryDirectory(prefix="sft_recipe-", ignore_cleanup_errors=True) as folder:
        rows, errors = _train(config, schedule.total_steps, Path(folder), device)
    if not rows:
        last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
        yield failed("measured", "the measured steps failed: {last}", "{last}", last=last)
        return
    counted = rows[WARM_UP_STEPS:]
    seconds = [row["perf/seconds"] for row in counted]
    per_second = sum(row["train/tokens"] for row in counted) / sum(seconds)
    yield passed(
        "measured",
        "{median:.2f} s a step, {tokens:,.0f} tokens/s: about {hours:.2f} h and a peak of {peak:.2f} GiB, both without "
        "evaluations and saves",
        median=statistics.median(seconds), tokens=per_second,
        hours=tokens * done.left(schedule) / schedule.steps_per_epoch / per_second / 3600,
        peak=max(row["perf/memory_gb"] for row in rows),
    )  # fmt: skip


def _train(config: Config, steps: int, folder: Path, device: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of the first steps of a run, started as train.sh starts it, and its error messages.

    It is killed before its last step, since it would save then; there are no rows of one that fails.
    """
    tree = config.model_dump(mode="json")
    tree["trainer"] |= {
        "output_dir": str(folder / "run"), "save_freq": -1, "test_freq": -1, "resume_from": None,
        "total_training_steps": max(steps, MOST_STEPS + 1), "logger": ["console"], "wandb_project": None,
        "master_port": None,
    }  # fmt: skip
    tree["data"] |= {"val_files": None, "val_ratio": 0.0}
    tree["eval"] |= {"generate": 0, "prompts": []}
    del tree["trainer"]["early_stopping"]
    (folder / "config.json").write_text(to_json(Config.model_validate(tree)))
    environment = {**(HEAP_SETTINGS if device == "cpu" else {}), **os.environ}
    command = [sys.executable, "-m", "sft_recipe.launch.local"]
    metrics = folder / "run/metrics.jsonl"
    with open(folder / "config.json") as source, open(folder / "errors", "w+") as errors:
        run = subprocess.Popen(
            command, stdin=source, stdout=subprocess.DEVNULL, stderr=errors, env=environment, start_new_session=True
        )
        previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the run has to end as well
        try:
            while run.poll() is None and not _is_enough(_rows(metrics)):
                time.sleep(POLL_SECONDS)
            has_failed = bool(run.returncode)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            signal.signal(signal.SIGTERM, previous)
        errors.seek(0)
        return [] if has_failed else _rows(metrics), errors.read()


def _rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of complete steps; the last line may be half written."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    return [row for row in map(json.loads, lines) if row["step"]]


def _is_enough(rows: list[dict[str, Any]]) -> bool:
    counted = [row["perf/seconds"] for row in rows[WARM_UP_STEPS:]]
    return len(rows) >= MOST_STEPS or sum(counted) >= ENOUGH_SECONDS
