"""The log of a run: progress and messages on the console, rows in metrics.jsonl, numbers for verl's loggers."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft_recipe import timing
from sft_recipe.config.schema import Config
from sft_recipe.distributed.rendezvous import attempt
from sft_recipe.errors import CheckpointError, first_line
from sft_recipe.evaluation.generation import GenerationResult, Sample
from sft_recipe.language import plural
from sft_recipe.tracking.answer_tables import log_answers
from sft_recipe.tracking.console import console
from sft_recipe.tracking.loggers import create_loggers
from sft_recipe.tracking.metrics_file import FILE, SAMPLES, MetricsFile
from sft_recipe.tracking.run_facts import PEAK_MEMORY, PREDICTED_MEMORY, add_facts, read_facts
from sft_recipe.tracking.train_log import FILE as TEXT
from sft_recipe.tracking.train_log import TrainLog

ALWAYS_SHOWN = {"val/loss", "train/epoch_loss"}  # rows with these are shown whatever trainer.log_freq is
SHOWN_SAMPLES, SAMPLE_WIDTH = 3, 160  # in the terminal; characters


class RunLog:
    """Rank 0's log; on other ranks, where it is not enabled, every method does nothing.

    `metrics.jsonl` has one JSON object per optimizer step: `step`, `epoch`, `train/loss`, `train/grad_norm`,
    `train/lr`, `train/tokens`, `train/supervised_tokens`, `perf/...`, `format_version`, and `val/loss` and
    `val/tokens` where validation ran.
    """

    def __init__(self, config: Config, completed_steps: int, total_steps: int, enabled: bool):
        """Open metrics.jsonl and keep its rows up to `completed_steps`, and start the loggers.

        Raises CheckpointError where the file cannot be written, PreflightError where a logger cannot be started.
        """
        self.enabled = enabled
        if not enabled:
            return
        self.console = console()
        path = config.trainer.run_folder / FILE
        try:
            self.rows = MetricsFile(path, completed_steps)
            self.text = TrainLog(path.with_name(TEXT), self.rows.read())
            generates = config.eval.generate or config.eval.prompts
            self.answers = MetricsFile(path.with_name(SAMPLES), completed_steps) if generates else None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None
        is_restart = attempt() > 0
        self.loggers = create_loggers(config, is_continued=completed_steps > 0 or is_restart)
        self.bar = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[state]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("Training", total=total_steps, completed=completed_steps, state="")
        self.total = total_steps
        self.log_freq = config.trainer.log_freq

    def start(self) -> None:
        """Show the progress bar, where there is a terminal."""
        if self.enabled and self.console.is_terminal:
            self.bar.start()

    def stop(self) -> None:
        """Remove the progress bar and close the loggers."""
        if self.enabled:
            if self.console.is_terminal:
                self.bar.stop()
            self._log_elsewhere(lambda loggers: loggers.finish())

    def say(self, text: str) -> None:
        """Print a message."""
        if self.enabled:
            self.console.print(text, soft_wrap=True, markup=False)

    def start_up(self) -> None:
        """Print how long each phase until the first step took in this rank, and write it to timing.json."""
        if self.enabled:
            self.say(timing.table())
            with suppress(OSError):
                timing.write(self.rows.path.parent)

    def validating(self, done: int, total: int) -> None:
        """Show how many examples are validated; without a terminal, print a message at the beginning only."""
        if self.enabled and self.console.is_terminal:
            self.bar.update(self.task, state=f"validating, {done:,} of {plural(total, 'example')}")
        elif done == 0:
            self.say(f"validating {plural(total, 'example')}")

    def step(self, row: dict[str, Any]) -> None:
        """Record one optimizer step, or the evaluation before the first: on the disk first, then everywhere else."""
        if not self.enabled:
            return
        self._write(row)
        self.text.add(row)
        is_shown = row["step"] % self.log_freq == 0 or row["step"] == self.total or bool(row.keys() & ALWAYS_SHOWN)
        if is_shown:
            self._log_elsewhere(lambda loggers: loggers.log(data=_numbers(row), step=row["step"]))
        if "train/loss" in row:
            state = _state(row)
            self.bar.update(self.task, completed=row["step"], state=state)
            if is_shown and not self.console.is_terminal:
                self.say(f"step {row['step']}/{self.total}  {state}")
        if row.get("val/loss") is not None:
            self.say(_evaluation(row))

    def samples(self, step: int, result: GenerationResult) -> None:
        """Print some answers and how they were scored; write all to samples.jsonl and the tables of the loggers."""
        if not self.enabled or not self.answers or not result.samples:
            return
        self.answers.add({"step": step, "samples": [asdict(sample) for sample in result.samples]})
        self._log_elsewhere(lambda loggers: log_answers(loggers.logger, step, result.samples))
        for sample in result.samples[:SHOWN_SAMPLES]:
            self.say(_sample(sample))
        if result.scores:
            found = result.metrics()
            tools = f", tool calls {found['eval/tool_match']:.2f}" if "eval/tool_match" in found else ""
            self.say(
                f"step {step}: BLEU-4 {found['eval/bleu4']:.2f}, ROUGE-L {found['eval/rouge_l']:.3f}, exact match "
                f"{found['eval/exact_match']:.2f}{tools} over {plural(int(found['eval/samples']), 'answer')}, where "
                f"{found['eval/truncated']} were cut off and {found['eval/empty']} empty ({result.scores.signature})"
            )

    def record(self) -> None:
        """Write all rows to the disk. Raises OSError."""
        if self.enabled:
            self.rows.flush()

    def conclude(
        self,
        model: Path,
        best: Path | None,
        saves: list[tuple[float, float]],
        seconds: float,
        skipped_steps: int,
        peak_memory: float,
    ) -> None:
        """Print how the loss changed over all steps, what saving cost, the peak of memory, and where the model is.

        `model` is the folder of the newest model, `best` that of the best evaluated one, if any was.
        `saves` holds two durations in seconds for each save: until it was complete, and how long it blocked training.
        `seconds` is the duration of the training since it was started or resumed, `skipped_steps` the number of steps
        whose gradients were not finite, `peak_memory` the GiB of the rank that had most, also for run.json.
        """
        if not self.enabled:
            return
        losses = [loss for loss in (row.get("train/loss") for row in self.rows.read()) if loss is not None]
        part = min(10, len(losses) // 5)
        if part > 1:
            first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
            self.say(f"Mean loss {first:.4f} in the first {part} steps, {last:.4f} in the last {part}.")
        if skipped_steps:
            self.say(
                f"{skipped_steps} of {plural(self.total, 'step')} changed nothing: gradients that were not finite "
                "(train/skipped_steps in metrics.jsonl)."
            )
        took, blocked = sum(save[0] for save in saves), sum(save[1] for save in saves)
        share = 100 * blocked / seconds if seconds else 0.0
        count = plural(len(saves), "checkpoint")
        self.say(
            f"Training waited {blocked:.1f} s for {count} ({share:.1f}% of the run); writing took {took:.1f} s, "
            "reading back not counted."
        )
        folder = self.rows.path.parent
        add_facts(folder, {PEAK_MEMORY: round(peak_memory, 4)})
        predicted = read_facts(folder).get(PREDICTED_MEMORY)
        expected = f", predicted {predicted:.2f}" if predicted else ""
        self.say(f"Peak memory of a rank: {peak_memory:.2f} GiB{expected}.")
        self.say(f"The model is in {model}")
        if best and best.resolve() != model.resolve():
            self.say(f"The best evaluated model ({best.resolve().parent.name}) is in {best}")

    def _log_elsewhere(self, act: Callable[[Any], None]) -> None:
        """A logger that fails, such as one whose process was stopped with the job, does not end the run."""
        try:
            if self.loggers:
                act(self.loggers)
        except Exception as error:
            self.loggers = None
            self.say(
                f"WARNING: trainer.logger failed and gets nothing more: {first_line(error)}. {FILE} has all steps."
            )

    def _write(self, row: dict[str, Any]) -> None:
        was_writable = self.rows.is_writable
        self.rows.add(row)
        if self.rows.is_writable != was_writable:
            state = "is written again" if self.rows.is_writable else f"cannot be written: {self.rows.problem}"
            self.say(f"WARNING: {self.rows.path} {state}. Its rows are kept in memory until it can be.")


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the loggers, which have the step apart, and all names in a group: train/, val/, eval/ or perf/."""
    renamed = {"train/epoch" if key == "epoch" else key: value for key, value in row.items() if key != "step"}
    return {key: value for key, value in renamed.items() if value is not None}


def _sample(sample: Sample) -> str:
    def short(text: str | None) -> str:
        words = " ".join((text or "").split())
        return words if len(words) <= SAMPLE_WIDTH else f"{words[:SAMPLE_WIDTH]} ..."

    lines = [f"  prompt     {short(sample.prompt)}", f"  answer     {short(sample.answer) or '(empty)'}"]
    return "\n".join(lines + ([] if sample.reference is None else [f"  reference  {short(sample.reference)}"]))


def _evaluation(row: dict[str, Any]) -> str:
    def describe(prefix: str) -> str:
        accuracy = row.get(f"{prefix}token_accuracy")
        right = f", {100 * accuracy:.1f}% of tokens right" if accuracy is not None else ""
        return f"{row[f'{prefix}loss']:.4f} over {plural(row[f'{prefix}tokens'], 'token')}{right}"

    names = [key.split("/")[1] for key in row if key.startswith("val/") and key.endswith("/loss") and key != "val/loss"]
    lines = [f"step {row['step']}: validation loss {describe('val/')}"]
    return "\n".join([*lines, *(f"  {name}: {describe(f'val/{name}/')}" for name in names)])


def _state(row: dict[str, Any]) -> str:
    parts = [
        f"loss {row['train/loss']:.4f}",
        f"lr {row['train/lr']:.2e}",
        f"grad norm {row['train/grad_norm']:.2f}",
        f"{row['perf/tokens_per_s']:,.0f} tokens/s",
    ]
    if row.get("perf/mfu"):
        parts.append(f"MFU {100 * row['perf/mfu']:.0f}%")
    return "  ".join([*parts, f"{row['perf/memory_gb']:.1f} GiB"])
