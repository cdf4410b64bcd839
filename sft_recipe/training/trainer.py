"""The training loop: it assembles a run from its parts, then trains, validates, logs and saves step by step."""

import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from verl.utils.torch_dtypes import PrecisionType

from sft_recipe import __version__, timing
from sft_recipe.checkpoint.async_saving import STATE, AsyncSaver, Export
from sft_recipe.checkpoint.manager import Checkpoints
from sft_recipe.checkpoint.manifest import fingerprint, read_manifest
from sft_recipe.checkpoint.state import FsdpState, MegatronState
from sft_recipe.config.auto import compute_dtype
from sft_recipe.config.schema import Config
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.distributed.signals import EXIT_PREEMPTED, SignalHandler
from sft_recipe.distributed.watchdog import COLLECTIVE_TIMEOUT, Watchdog
from sft_recipe.errors import CheckpointError, TrainingError
from sft_recipe.evaluation.evaluator import Evaluation, Evaluator
from sft_recipe.evaluation.generation import GenerationResult, answer_generator
from sft_recipe.export.huggingface import MODEL, ModelSaver
from sft_recipe.language import plural
from sft_recipe.models.stats import ModelStats
from sft_recipe.report.recorder import RunReporter
from sft_recipe.tracking.console import notice
from sft_recipe.tracking.run_log import RunLog
from sft_recipe.training.batches import BatchBuilder
from sft_recipe.training.early_stopping import EarlyStopping
from sft_recipe.training.metrics import StepMetrics
from sft_recipe.training.schedule import Schedule
from sft_recipe.training.worker import Worker

MAX_NONFINITE_STEPS = 10  # in a row


class SFTTrainer:
    """Trains one run to its end. Every rank builds one, and all methods are collective.

    `resumed_step` is the step of the checkpoint that the run resumes from, or 0; `loss_difference` that of the first
    micro-batch from plain transformers, None where it was not compared.
    """

    def __init__(
        self,
        config: Config,
        inputs: RunInputs,
        device: str,
        stats: ModelStats,
        resume: Path | None,
        watchdog: Watchdog,
    ):
        """Build the run on "cuda" or "cpu", and restore the checkpoint `resume`. Raises CheckpointError."""
        self.config = config
        self.inputs = inputs
        self.device = device
        self.resume = resume
        self.watchdog = watchdog
        self.signals = SignalHandler(config.trainer.max_time)
        self.schedule = Schedule.from_config(config, len(inputs.train))
        torch.manual_seed(config.trainer.seed)
        self.worker = Worker(config, inputs.model, self.schedule.total_steps, device, watchdog.heartbeat)
        worker = self.worker
        self.batches = BatchBuilder(
            config,
            inputs.train,
            inputs.tokenizer.pad_token_id,
            worker.data_rank,
            worker.data_ranks,
            worker.packs_documents,
        )
        dtype = PrecisionType.to_dtype(compute_dtype(config.fsdp, device))
        self._build_checkpointing(dtype)
        restored = self._restore()
        self.resumed_step = restored.step
        self.unvalidated = restored.unvalidated
        self.metrics = StepMetrics(
            self.schedule, inputs.train, stats.products, device, dtype, skipped_steps=restored.skipped_steps
        )
        self.metrics.epoch_loss = restored.epoch_loss
        self.stopping = EarlyStopping(config.trainer.early_stopping, restored.early_stopping)
        self.evaluator = self._build_evaluator()
        self.loss_difference = self._verify_first_step()
        self.worker.free_cache()

    def fit(self) -> int:
        """Train to the end. Returns the exit code: 0, or EXIT_PREEMPTED after a request to stop, when all is saved.

        Raises TrainingError after ten steps in a row whose gradients were not finite, CheckpointError where the last
        state cannot be saved.
        """
        started = time.perf_counter()
        steps = self._remaining_steps()
        self._open_log(steps)
        self.signals.listen()
        step, row = 0, None
        try:
            self._evaluate_before_training()
            for step in steps:
                row = self._unvalidated_row() or self.train_step(step)
                found = self._evaluation(step)
                self._log_step(step, row | found.metrics, found.generated)
                row, is_best = None, bool(found.metrics) and self.stopping.update(found.metrics)
                reason = self.stopping.reason()
                is_over = self.schedule.is_last(step) or reason is not None
                requests = self._gather_requests(step)
                is_wanted = requests.stop or requests.save or (is_best and self.config.trainer.save_best)
                if is_wanted or is_over or self._is_save_due(step):
                    self._save(step, self._metadata(step, found.metrics), is_last=is_over or requests.stop)
                if is_over:
                    self._finish(step, started, reason)
                    break
                if requests.stop:
                    return self._stop(step)
        except _StopRequested:
            if row is not None:
                self._save(step, self._metadata(step, unvalidated=row), is_last=True)
            return self._stop(step)
        finally:
            self.signals.is_over = True
            self.log.stop()
        return 0

    def train_step(self, step: int) -> dict[str, Any]:
        """Run optimizer step `step` (from 1). Returns its row of metrics."""
        started = time.perf_counter()
        plan = self.batches.plan_step(step)
        self.watchdog.set_phase(f"step {step}: reading its examples")
        self._seed_step(step)
        self.worker.set_step(step - 1)
        learning_rate = self.worker.learning_rate
        batch = self.batches.build(self.inputs.train, plan)
        self.batches.plan_ahead(step + 1)
        data_seconds = time.perf_counter() - started
        self.watchdog.set_phase(f"step {step}: computing")
        metrics = self.worker.train(batch)
        seconds = time.perf_counter() - started
        efficiency = round(plan.token_efficiency, 4)
        perf = {"perf/data_seconds": round(data_seconds, 4), "perf/token_efficiency": efficiency}
        return self.metrics.row(step, plan.indices, metrics, learning_rate, seconds) | perf

    def _build_checkpointing(self, dtype: torch.dtype) -> None:
        config, engine = self.config, self.worker.engine
        # Saving communicates on this group while training communicates on the default one.
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        folder = config.trainer.run_folder / "checkpoints"
        self.checkpoints = Checkpoints(folder, config.trainer.max_ckpt_to_keep, self.resume, group)
        if self.worker.is_sft_engine:
            saver = ModelSaver(config, self.inputs, engine.module, dtype)
            self.state: FsdpState | MegatronState = FsdpState(engine, config.lora.enabled, group)
            if dist.get_rank() == 0:
                saver.check()
            self.export = Export(saver.save, saver.size())
        else:
            self.state = MegatronState(engine)
            self.export = Export(lambda state, folder: None, 0)

    def _build_evaluator(self) -> Evaluator:
        answers = answer_generator(self.config, self.inputs, self.worker.generate)
        return Evaluator(self.config.data.token_budget, self.inputs.validation, self.batches, self.worker, answers)

    def _verify_first_step(self) -> float | None:
        """Return the difference from the loss that plain transformers computes; None where it is not compared."""
        steps = self._remaining_steps()
        if not self.config.model.verify_first_step or not steps:
            return None
        self.watchdog.set_phase("verifying the first step")
        batch = self.batches.build(self.inputs.train, self.batches.plan_step(steps[0]))
        return self.worker.verify(batch)

    def _restore(self) -> "_Restored":
        if self.resume is None:
            return _Restored()
        self.state.read(self.resume / STATE)
        manifest = read_manifest(self.resume)
        self.worker.restore_loss_scale(manifest.get("loss_scale"))
        total_steps = self.schedule.total_steps
        if "format_version" not in manifest and dist.get_rank() == 0:
            notice(
                f"{self.resume} was saved by an older version of sft_recipe. Its state is restored exactly; where this "
                "version computes with other kernels (LoRA and fp32 on CPUs) losses may differ in the last digits."
            )
        if manifest["total_steps"] != total_steps and dist.get_rank() == 0:
            notice(
                f"The run was planned for {plural(manifest['total_steps'], 'step')} and now goes to {total_steps}: "
                "the learning rate follows the schedule for the new number."
            )
        return _Restored(
            manifest["step"],
            manifest["skipped_steps"],
            manifest["unvalidated"],
            manifest.get("early_stopping"),
            tuple(manifest.get("epoch_loss", (0.0, 0))),
        )

    def _remaining_steps(self) -> range:
        """A step whose evaluation was interrupted comes again, without being trained again.

        None remain where the run had stopped early, unless its early stopping is configured otherwise now.
        """
        completed = self.resumed_step - (self.unvalidated is not None)
        is_over = self.stopping.reason() is not None and self.unvalidated is None
        return range(completed + 1, completed + 1 if is_over else self.schedule.total_steps + 1)

    def _unvalidated_row(self) -> dict[str, Any] | None:
        row, self.unvalidated = self.unvalidated, None
        return row

    def _open_log(self, steps: range) -> None:
        total, overlap, is_first = self.schedule.total_steps, self.config.trainer.async_save, dist.get_rank() == 0
        self.log = RunLog(self.config, steps.start - 1, total, enabled=is_first)
        self.saver = AsyncSaver(
            self.checkpoints, self.state, self.export, self.log.record, self.log.say, overlap, last_step=total
        )
        is_resumed = self.resume is not None
        self.report = RunReporter(self.config.trainer.run_folder, self.log.say, is_resumed, enabled=is_first)
        self.first_step, self.logged_saves, self.nonfinite_steps = steps.start, 0, 0
        if self.resume and not steps:
            self._finish_again(self.resume, steps.start - 1)
        self.log.start()

    def _log_step(self, step: int, row: dict[str, Any], generated: GenerationResult) -> None:
        """Raises TrainingError after too many steps in a row without finite gradients, or where no step had any."""
        is_finite = math.isfinite(row["train/grad_norm"])
        self.nonfinite_steps = 0 if is_finite else self.nonfinite_steps + 1
        if not is_finite:
            self.log.say(f"step {step}: the gradient is not finite; this step changed nothing")
        self.saver.poll(step)
        self.log.step(row | self.saver.timings_since(self.logged_saves))
        self.log.samples(step, generated)
        self.logged_saves = len(self.saver.timings)
        if step == self.first_step and timing.ENABLED:
            timing.mark("first step")
            self.log.start_up()
        has_failed = (
            self.metrics.skipped_steps == self.schedule.total_steps or self.nonfinite_steps == MAX_NONFINITE_STEPS
        )
        if has_failed or self.schedule.is_evaluation_due(self.config.trainer.test_freq, step):
            self.report.update(is_last=has_failed)
        if has_failed:
            raise TrainingError(_nonfinite_advice(step, self.nonfinite_steps, self.config))

    def _evaluation(self, step: int) -> Evaluation:
        """Evaluate where that is due. Raises _StopRequested, on all ranks, as soon as one of them must stop."""

        def progress(done: int, total: int) -> None:
            self.watchdog.set_phase(f"step {step}: validating, {done} of {total} examples")
            self.log.validating(done, total)
            if self._any_rank(self.signals.wants_stop)[0]:
                raise _StopRequested

        if not self.schedule.is_evaluation_due(self.config.trainer.test_freq, step):
            return Evaluation()
        evaluation = self.evaluator.run(progress)
        self.worker.free_cache()
        return evaluation

    def _evaluate_before_training(self) -> None:
        """Raises _StopRequested like `_evaluation`."""
        found = self._evaluation(0) if self.resume is None else Evaluation()
        if found.metrics:
            self.log.step({"step": 0, "epoch": 0.0} | found.metrics)
            self.report.update()
        self.log.samples(0, found.generated)

    def _is_save_due(self, step: int) -> bool:
        return self.schedule.is_due(self.config.trainer.save_freq, step) or step == self.saver.retry_at

    def _save(self, step: int, metadata: dict[str, Any], is_last: bool) -> None:
        if step > self.resumed_step:
            self.watchdog.set_phase(f"step {step}: saving")
            self.signals.wants_save = False
            self.saver.start(step, metadata, is_last)

    def _metadata(
        self, step: int, evaluation: dict[str, Any] | None = None, unvalidated: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a checkpoint's manifest says about the run; `unvalidated` is the row of an interrupted evaluation."""
        compared = self.config.trainer.early_stopping
        value = evaluation[compared.metric] if evaluation else math.nan
        return {
            "step": step,
            "total_steps": self.schedule.total_steps,
            "epoch": self.schedule.epoch(step),
            "skipped_steps": self.metrics.skipped_steps,
            "epoch_loss": self.metrics.epoch_loss,
            "loss_scale": self.worker.loss_scale,
            "evaluation": {"metric": compared.metric, "mode": compared.mode, "value": value}
            if math.isfinite(value)
            else None,
            "early_stopping": self.stopping.state(),
            "unvalidated": unvalidated,
            "world_size": dist.get_world_size(),
            "identity": self.inputs.identity(self.config),
            "config": fingerprint(self.config.public()),
            "versions": {"sft_recipe": __version__}
            | {name: version(name) for name in ("torch", "verl", "transformers")},
        }

    def _finish_again(self, checkpoint: Path, step: int) -> None:
        """Raises CheckpointError where the export failed once more."""
        reason = self.stopping.reason()
        why = f", where the run stopped early: {reason}" if reason else ""
        self.log.say(f"Nothing is left to train: {checkpoint} is at step {step} of {self.schedule.total_steps}{why}.")
        self.report.conclude(reason)
        is_own = checkpoint.parent.resolve() == self.checkpoints.folder.resolve()
        if dist.get_rank() == 0 and is_own and self.worker.is_sft_engine and not (checkpoint / MODEL).exists():
            self.saver.export_again(checkpoint)
            self._check_exported(checkpoint)
            self.log.say(f"The model is in {checkpoint / MODEL}")

    def _check_exported(self, checkpoint: Path) -> None:
        if problem := self.saver.export_problem:
            raise CheckpointError(
                f"the model of {checkpoint} cannot be exported: {problem}. Its state is saved: once the problem is "
                "solved, --resume_from auto exports the model."
            )

    def _finish(self, step: int, started: float, reason: str | None) -> None:
        """End the run after `step`, early where there is a `reason`. Raises CheckpointError."""
        self.saver.close(step)
        assert self.saver.newest is not None
        self._check_exported(self.saver.newest)
        if reason:
            self.log.say(f"Stopped early at step {step} of {self.schedule.total_steps}: {reason}.")
        seconds = time.perf_counter() - started
        best = self.checkpoints.best()
        self.log.conclude(
            self.saver.newest / MODEL, best and best / MODEL, self.saver.timings, seconds, self.metrics.skipped_steps,
            self.worker.peak_memory(),
        )  # fmt: skip
        self.report.conclude(reason)

    def _stop(self, step: int) -> int:
        self.saver.close(step)
        self.report.update(is_last=True)
        self.log.say(f"Stopped at step {step} of {self.schedule.total_steps}. Continue with --resume_from auto.")
        return EXIT_PREEMPTED

    def _seed_step(self, step: int) -> None:
        """Random state is a function of (seed, step, rank), so that a resumed run draws the same numbers."""
        sequence = np.random.SeedSequence([self.config.trainer.seed, step, self.worker.data_rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def _gather_requests(self, step: int) -> "_Requests":
        """Ranks notice requests at different moments and must act on them after the same step."""
        stop, save, failed = self._any_rank(self.signals.wants_stop, self.signals.wants_save, self.saver.has_failed())
        if failed:
            self.saver.wait(step)
        return _Requests(stop, save)

    def _any_rank(self, *values: bool) -> list[bool]:
        """Returns for each value whether it is true on any rank."""
        flags = torch.tensor([int(value) for value in values], device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]


class _Restored(NamedTuple):
    """What the manifest of a checkpoint restores; `unvalidated` is the row of an interrupted evaluation."""

    step: int = 0
    skipped_steps: int = 0
    unvalidated: dict[str, Any] | None = None
    early_stopping: dict[str, Any] | None = None
    epoch_loss: tuple[float, int] = (0.0, 0)


class _Requests(NamedTuple):
    """What any rank was asked to do after this step."""

    stop: bool
    save: bool


class _StopRequested(Exception):
    """An evaluation was interrupted."""


def _nonfinite_advice(step: int, count: int, config: Config) -> str:
    steps = f"the last {count} steps, up to step {step}," if count > 1 else f"step {step}"
    return (
        f"the gradients of {steps} were not finite, so the model no longer changes. Lower the learning rate (now "
        f"{config.optim.lr:g}), lower GRAD_CLIP, or compute in fp32 (fsdp.mixed_precision.param_dtype=fp32); if it is "
        "the first step, look for NaN in the model's weights. Checkpoints from before are complete."
    )
