"""What a person watches (banner, bar, lines) and what a machine reads (metrics.jsonl, verl's loggers)."""

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sft_recipe import timing
from sft_recipe.config.auto import compute_dtype, effective_strategy, uses_gradient_checkpointing
from sft_recipe.config.preflight import is_installed
from sft_recipe.config.schema import Config
from sft_recipe.config.validation import nearest
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.errors import CheckpointError, ConfigError, PreflightError
from sft_recipe.models.memory_estimate import MemoryEstimate
from sft_recipe.models.stats import ModelStats


def console() -> Console:
    """Where people read; lines are not folded where nobody looks."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=200)


class RunLog:
    """Rank 0's view of a run; on other ranks every method does nothing.

    `metrics.jsonl` has one JSON object per optimiser step: `step`, `epoch`, `train/loss`, `train/grad_norm`,
    `train/lr`, `train/tokens`, `train/supervised_tokens`, `perf/...`, and `val/loss` where validation ran.
    """

    def __init__(self, config: Config, first_step: int, total_steps: int, enabled: bool):
        """`first_step` is the number of steps whose rows are kept. Raises CheckpointError where they cannot be."""
        self.enabled = enabled
        if not enabled:
            return
        self.console = console()
        path = config.trainer.run_folder / "metrics.jsonl"
        try:
            self.rows = RowFile(path, first_step)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None
        self.tracking = _tracking(config)
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        self.bar = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            left,
            TextColumn("{task.fields[state]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("Training", total=total_steps, completed=first_step, state="")
        self.total = total_steps

    def start(self) -> None:
        """Show the bar, where there is a terminal to draw it on."""
        if self.enabled and self.console.is_terminal:
            self.bar.start()

    def stop(self) -> None:
        if self.enabled:
            if self.console.is_terminal:
                self.bar.stop()
            if self.tracking:
                self.tracking.finish()

    def say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, soft_wrap=True, markup=False)

    def start_up(self) -> None:
        """Where the time until now went, in this rank."""
        if self.enabled:
            self.say(timing.table())
            with suppress(OSError):
                timing.write(self.rows.path.parent)

    def validating(self, done: int, total: int) -> None:
        """ValidationResult has come so far; without a terminal its beginning is told."""
        if self.enabled and self.console.is_terminal:
            self.bar.update(self.task, state=f"validating, {done:,} of {total:,} examples")
        elif done == 0:
            self.say(f"validating {total:,} examples")

    def conclude(self, model: Path, saves: list[tuple[float, float]], seconds: float) -> None:
        """What came of the whole run, earlier parts of a resumed one included; what saving cost; where the model is.

        `saves` has a save's seconds until it was whole, and those that training waited; `seconds` are this part's.
        """
        if not self.enabled:
            return
        losses = [loss for loss in self.rows.values("train/loss") if loss is not None]
        part = min(10, len(losses) // 5)
        if part > 1:
            first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
            self.say(f"Mean loss {first:.4f} in the first {part} steps, {last:.4f} in the last {part}.")
        took, waited = sum(save[0] for save in saves), sum(save[1] for save in saves)
        share = 100 * waited / seconds if seconds else 0.0
        count = f"{len(saves)} checkpoint{'s' * (len(saves) != 1)}"
        self.say(f"{count} took {took:.1f} s, for {waited:.1f} s of which training waited ({share:.1f}% of its time).")
        self.say(f"The model is in {model}")

    def record(self) -> None:
        """Put all rows on the disk. Raises OSError where that cannot be done."""
        if self.enabled:
            self.rows.flush()

    def step(self, row: dict[str, Any]) -> None:
        """Record one optimiser step everywhere; on disk before anything else happens, where the disk can be written."""
        if not self.enabled:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        was_writable = self.rows.is_writable
        self.rows.add(clean)
        if self.rows.is_writable != was_writable:
            state = "is written again" if self.rows.is_writable else f"cannot be written: {self.rows.problem}"
            self.say(f"WARNING: {self.rows.path} {state}. Its rows are kept in memory until it can be.")
        if self.tracking:
            numbers = {key: value for key, value in row.items() if key != "step" and value is not None}
            self.tracking.log(data=numbers, step=row["step"])
        state = _state(row)
        self.bar.update(self.task, completed=row["step"], state=state)
        if not self.console.is_terminal:
            self.say(f"step {row['step']}/{self.total}  {state}")
        if row.get("val/loss") is not None:
            self.say(f"step {row['step']}: validation loss {row['val/loss']:.4f} over {row['val/tokens']:,} tokens")


def banner(
    config: Config,
    prepared: RunInputs,
    device: str,
    stats: ModelStats,
    memory: MemoryEstimate | None,
    steps_per_epoch: int,
    steps: int,
    done: int,
) -> None:
    """The essentials of a run, before its first step."""
    data, lora = config.data, config.lora
    is_checkpointing = uses_gradient_checkpointing(config, device)
    checkpointing = ("on" if is_checkpointing else "off") + (
        f" ({memory.describe(is_checkpointing)})" if memory else ""
    )
    dtype = compute_dtype(config.fsdp, device)
    share = f"{stats.trainable:,} trainable of {stats.total:,} ({100 * stats.trainable / stats.total:.2f}%)"
    adapters = f", LoRA rank {lora.rank}, alpha {lora.alpha:g}" if lora.enabled else ""
    validation = f"{len(prepared.validation):,} examples" if prepared.validation else "none"
    budget = f"micro-batches of up to {data.token_budget:,} tokens on each"
    rate = f"learning rate {config.optim.lr:g}, {config.optim.lr_scheduler_type}"
    rows = {
        "device": _machine(config, device),
        "strategy": f"{_strategy(config, device)}, {dtype}, gradient checkpointing {checkpointing}",
        "model": prepared.model.name,
        "parameters": share + adapters,
        **_data_rows(config, prepared),
        "validation": validation,
        "batches": f"{data.train_batch_size} examples a step over all ranks, {budget}",
        "steps": f"{steps:,} ({steps_per_epoch:,} an epoch), {rate}",
        "output": config.trainer.output_dir,
    }
    if done:
        rows["resumed"] = f"after step {done:,}"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(Panel(table, title="Supervised fine-tuning", title_align="left", expand=False))


def _data_rows(config: Config, prepared: RunInputs) -> dict[str, str]:
    """What is trained on, what of it is learnt, and how long it is."""
    train, data = prepared.train, config.data
    tokens, lengths = int(train.lengths.sum()), np.sort(train.lengths)
    share = 100 * train.supervised / tokens
    middle, most = (int(lengths[int(part * (len(lengths) - 1))]) for part in (0.5, 0.95))
    ends = " or ".join(prepared.tokenizer.convert_ids_to_tokens(prepared.stop_token_ids()))
    repeated = len(train) - len(np.unique(train.store.digests[train.numbers]))
    counts = prepared.source_counts
    sources = ", ".join(f"{source.name} {source.target_count:,} of {source.examples:,}" for source in counts)
    is_mixed = len(counts) > 1 or any(source.target_count != source.examples for source in counts)
    turns = "the last assistant turn" if data.train_on == "last" else "all assistant turns"
    without = "" if data.train_on_reasoning else ", without their reasoning"
    ending = f"through {ends}" if ends else "without a special token at their end: the model will not learn to stop"
    return {
        "data": f"{len(train):,} examples, {tokens:,} tokens" + (f" ({sources})" if is_mixed else ""),
        "learnt": f"{train.supervised:,} tokens ({share:.0f}%): {turns}{without}, {ending}",
        "lengths": f"half up to {middle:,} tokens, 95% up to {most:,}, longest {lengths[-1]:,}"
        + (f"; {repeated:,} examples repeat others" if repeated else ""),
    }


def _machine(config: Config, device: str) -> str:
    ranks = config.trainer.world_size
    count = f"{ranks} rank{'s' * (ranks > 1)}" + (
        f" on {config.trainer.nnodes} machines" if config.trainer.nnodes > 1 else ""
    )
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {count}"
    threads = torch.get_num_threads()
    return f"CPU, {count} of {threads} thread{'s' * (threads > 1)}"


def _strategy(config: Config, device: str) -> str:
    if device == "cpu" and config.trainer.world_size == 1 and config.fsdp.strategy != "megatron":
        return "no FSDP (one CPU rank holds the whole model)"
    used = effective_strategy(config.fsdp, device)
    return used if used == config.fsdp.strategy else f"{used} ({config.fsdp.strategy} does not run on a CPU)"


def notice(text: str) -> None:
    """Something that a user must not miss."""
    console().print(Panel(text, title="notice", title_align="left", border_style="yellow", expand=False))


def _state(row: dict[str, Any]) -> str:
    parts = [
        f"loss {row['train/loss']:.4f}",
        f"lr {row['train/lr']:.2e}",
        f"grad norm {row['train/grad_norm']:.2f}",
        f"{row['perf/tokens_per_s']:,.0f} tokens/s",
    ]
    if row.get("perf/mfu"):
        parts.append(f"MFU {100 * row['perf/mfu']:.0f}%")
    return "  ".join([*parts, f"{row['perf/memory_gb']:.1f} GB"])


class RowFile:
    """A file of JSON objects, a line each, in the order of their steps; rows wait in memory while it cannot be written.

    Two threads may use it: one that adds rows, one that needs them on the disk.
    """

    def __init__(self, path: Path, steps: int):
        """Keep the rows up to step `steps` of what is there: the others will be trained again. Raises OSError."""
        self.path = path
        self.problem = ""
        self.waiting = b""
        self.guard = threading.Lock()
        kept = b"".join(_rows_up_to(path, steps)) if steps and path.is_file() else b""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self.end = len(kept)  # of whole rows, in bytes

    @property
    def is_writable(self) -> bool:
        return not self.problem

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, or keep it where that fails; `problem` tells."""
        with self.guard:
            self.waiting += json.dumps(row).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            self.problem = error.strerror or str(error)
        else:
            self.problem = ""

    def flush(self) -> None:
        """Put the rows that wait on the disk. Raises OSError."""
        with self.guard, self.path.open("r+b") as file:  # not made anew: a folder that has vanished is an error
            file.truncate(self.end)  # half a row may stand there, where the disk was full
            file.seek(self.end)
            file.write(self.waiting)
            file.flush()
            os.fsync(file.fileno())
            self.end, self.waiting = self.end + len(self.waiting), b""

    def values(self, key: str) -> list[Any]:
        """Of one key in all rows that have it."""
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [row[key] for row in rows if key in row]


def _rows_up_to(path: Path, steps: int) -> Iterator[bytes]:
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= steps:
                yield line
        except (ValueError, KeyError, TypeError):  # half a row
            continue


def check_loggers(config: Config) -> None:
    """Raises ConfigError for a logger that verl does not have, PreflightError for one that is not installed."""
    if not _backends(config):
        return
    from verl.utils.tracking import Tracking

    for name in _backends(config):
        if name not in Tracking.supported_backend:
            known = ", ".join(Tracking.supported_backend)
            raise ConfigError(
                f"trainer.logger has {name}; there is {known}.{nearest(name, Tracking.supported_backend)}"
            )
        if name != "file" and not is_installed(name):
            raise PreflightError(f"trainer.logger names {name}, which is not installed: pip install {name}")


def _backends(config: Config) -> list[str]:
    """verl's loggers besides the console, which is ours."""
    names = [name for name in config.trainer.logger if name != "console"]
    return [*names, "wandb"] if config.trainer.wandb_project and "wandb" not in names else names


def _tracking(config: Config) -> Any:
    trainer, backends = config.trainer, _backends(config)
    if not backends:
        return None
    from verl.utils.tracking import Tracking

    if "tensorboard" in backends:
        os.environ.setdefault("TENSORBOARD_DIR", str(trainer.run_folder / "tensorboard"))
    return Tracking(
        project_name=trainer.wandb_project or trainer.project_name,
        experiment_name=trainer.experiment_name or trainer.run_folder.absolute().name,
        default_backend=backends,
        config=config.public(),
    )
