"""The loop, over verl's SFTTrainer: its worker and engine, our data, plan, checkpoints and logs."""

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tensordict import NonTensorData, TensorDict
from verl.trainer.sft_trainer import SFTTrainer as VerlSFTTrainer
from verl.utils import flops_counter
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode

from sft_recipe import __version__, timing
from sft_recipe.checkpoint.async_saving import STATE, AsyncSaver, Export
from sft_recipe.checkpoint.manager import Checkpoints
from sft_recipe.checkpoint.manifest import fingerprint, read_manifest
from sft_recipe.checkpoint.state import FsdpState, MegatronState
from sft_recipe.config.auto import compute_dtype, shares_prefixes
from sft_recipe.config.schema import AFTER_EACH_EPOCH, Config, StepInterval
from sft_recipe.data.batching import batch_indices, plan_micro_batches, steps_per_epoch
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.data.token_store import Examples
from sft_recipe.distributed.signals import EXIT_PREEMPTED, SignalHandler
from sft_recipe.distributed.watchdog import COLLECTIVE_TIMEOUT, Watchdog
from sft_recipe.engine.cpu.platform import measured_peak_flops
from sft_recipe.engine.patches import patch_model_class_lookup
from sft_recipe.engine.sft_engine import SFTEngine
from sft_recipe.engine.verl_config import build_verl_config
from sft_recipe.errors import TrainingError, is_debugging
from sft_recipe.evaluation.validation import evaluate
from sft_recipe.export.huggingface import MODEL, ModelSaver
from sft_recipe.models.stats import ModelStats
from sft_recipe.tracking.run_log import RunLog, notice

MAX_NONFINITE_STEPS = 10


class SFTTrainer(VerlSFTTrainer):
    """One run, from step `first_step` to its end. Every rank makes one; all methods are collective."""

    def __init__(
        self, config: Config, prepared: RunInputs, device: str, stats: ModelStats, resume: Path | None, watch: Watchdog
    ):
        self.recipe = config
        self.prepared = prepared
        self.device = device
        self.stats = stats
        self.resume = resume
        self.watch = watch
        self.steps_per_epoch = steps_per_epoch(len(prepared.train), config.data.train_batch_size)
        self.total_steps = config.trainer.total_training_steps or config.trainer.total_epochs * self.steps_per_epoch
        self.requests = SignalHandler(config.trainer.max_time)
        # verl reads no more of its own configuration than this in the parts that are kept.
        view = SimpleNamespace(trainer=SimpleNamespace(device=device))
        torch.manual_seed(config.trainer.seed)
        with _silenced_verl():
            super().__init__(view)

    def fit(self) -> int:
        """Train to the end. Returns an exit code: 0 done, STOPPED where it was asked to stop and all is saved.

        Raises TrainingError after ten steps in a row whose gradients were not finite, CheckpointError where the last
        state cannot be saved.
        """
        config, resumed = self.recipe.trainer, self.resume_global_step
        began = time.perf_counter()
        done = resumed - (self.unvalidated is not None)
        log = RunLog(self.recipe, done, self.total_steps, enabled=dist.get_rank() == 0)
        saving = self._saving(log)
        reported = bad_in_a_row = 0
        unvalidated = self.unvalidated
        self.requests.listen()
        if done >= self.total_steps:
            log.say(f"Nothing is left to train: {self.resume} is at step {done} of {self.total_steps}.")
        log.start()
        try:
            for step in range(done + 1, self.total_steps + 1):
                row, unvalidated = unvalidated or self._train_step(step), None
                is_last = step == self.total_steps
                bad_in_a_row = 0 if math.isfinite(row["train/grad_norm"]) else bad_in_a_row + 1
                if bad_in_a_row:
                    log.say(f"step {step}: the gradient is not finite; this step changed nothing")
                if self._is_due(config.test_freq, step, is_last) and self.prepared.validation:
                    try:
                        row |= self._validate(step, self.prepared.validation, log.validating)
                    except _StopRequested:
                        if step > resumed:
                            saving.start(step, self._metadata(step, unvalidated=row))
                        saving.close(step)
                        return self._stopped(step, log)
                saving.poll(step)
                log.step(row | saving.timings_since(reported))
                if step == done + 1 and timing.ENABLED:
                    timing.mark("first step")
                    log.start_up()
                reported = len(saving.timings)
                if bad_in_a_row == MAX_NONFINITE_STEPS:
                    raise TrainingError(_advice(step, self.recipe))
                asked = self._agree(saving.has_failed())
                if asked.failed_save:
                    saving.wait(step)
                is_due = self._is_due(config.save_freq, step, is_last) or step == saving.retry_at
                if (is_due or asked.stop or asked.save) and step > resumed:
                    self.watch.set_phase(f"step {step}: saving")
                    self.requests.wants_save = False
                    saving.start(step, self._metadata(step, row.get("val/loss")))
                if is_last:
                    saving.close(step)
                    assert saving.newest is not None
                    log.conclude(saving.newest / MODEL, saving.timings, time.perf_counter() - began)
                elif asked.stop:
                    saving.close(step)
                    return self._stopped(step, log)
        finally:
            self.requests.is_over = True
            log.stop()
        return 0

    # The seams of verl's trainer, in the order in which its constructor calls them.

    def _build_config(self) -> None:
        built = build_verl_config(self.recipe, self.prepared.model.folder, self.total_steps, self.device)
        self.model_config, self.engine_config = built.model, built.engine
        self.optimizer_config, self.checkpoint_config = built.optim, built.checkpoint
        self.profiler_config = None

    def _build_dataset(self) -> None:
        pass  # made ready before the process group: see prepare.py

    def _build_dataloader(self) -> None:
        pass  # a step's examples are a function of its number: see batching.py

    def _init_engine(self) -> None:
        patch_model_class_lookup()
        self.training_client.reset()

    def _build_ckpt_handler(self) -> None:
        config = self.recipe
        folder = config.trainer.run_folder / "checkpoints"
        # Of its own: saving talks on it while training talks on the default one.
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self.checkpoints = Checkpoints(folder, config.trainer.max_ckpt_to_keep, self.resume, group)
        self.is_ours = isinstance(self.engine, SFTEngine)  # or verl's Megatron engine, with a schedule of its own
        self.state: FsdpState | MegatronState = MegatronState(self.engine)
        self.export = Export(lambda folder: None, 0)
        if self.is_ours:
            self.engine.on_micro_batch = self.watch.heartbeat
            self.engine.shares_prefixes = shares_prefixes(config, self.device)
            self.state = FsdpState(self.engine, config.lora.enabled, group)
            saver = ModelSaver(config, self.prepared, self.engine.module, self._computed_in)
            self.export = Export(lambda folder: saver.save(folder / STATE, folder), saver.size())
        self.ckpt_handler = SimpleNamespace(load_checkpoint=self._resume)

    def _resume(self) -> int:
        self.skipped_steps = 0
        self.unvalidated: dict[str, Any] | None = None  # the row of a step whose validation was cut short
        if self.resume is None:
            return 0
        self.state.read(self.resume / STATE)
        metadata = read_manifest(self.resume)
        self.skipped_steps, self.unvalidated = metadata["skipped_steps"], metadata["unvalidated"]
        if metadata["total_steps"] != self.total_steps and dist.get_rank() == 0:
            notice(
                f"The run was planned for {metadata['total_steps']} steps and now goes to {self.total_steps}: "
                "the learning rate follows the schedule for the new number."
            )
        return metadata["step"]

    def _saving(self, log: RunLog) -> AsyncSaver:
        overlap = self.recipe.trainer.async_save
        return AsyncSaver(self.checkpoints, self.state, self.export, log.record, log.say, overlap)

    def _train_step(self, step: int) -> dict[str, Any]:
        """Optimiser step `step` (from 1); returns its row for the log."""
        started = time.perf_counter()
        data = self.recipe.data
        numbers = batch_indices(step - 1, len(self.prepared.train), data.train_batch_size, self._seed, data.shuffle)
        self.watch.set_phase(f"step {step}: reading its examples")
        self._seed_step(step)
        if self.is_ours:
            self.engine.set_step(step - 1)
        learning_rate = self.engine.optimizer.param_groups[0]["lr"]
        batch = self._make_batch(self.prepared.train, numbers)
        self.watch.set_phase(f"step {step}: computing")
        metrics = self._metrics(self.training_client.train_batch(batch))
        self.skipped_steps += not math.isfinite(metrics["grad_norm"])
        tokens = int(self.prepared.train.lengths[numbers].sum())
        supervised = sum(int(self.prepared.train[i][1].sum()) for i in numbers)
        seconds = time.perf_counter() - started
        return {
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 4),
            "train/loss": metrics["loss"],
            "train/grad_norm": metrics["grad_norm"],
            "train/lr": learning_rate,
            "train/tokens": tokens,
            "train/supervised_tokens": supervised,
            "train/skipped_steps": self.skipped_steps,
            "perf/seconds": round(seconds, 4),
            "perf/tokens_per_s": tokens / seconds,
            "perf/mfu": self._mfu(self.prepared.train.lengths[numbers], supervised, seconds),
            "perf/memory_gb": metrics["perf/max_memory_allocated_gb"],
        }

    def _mfu(self, lengths: np.ndarray, supervised: int, seconds: float) -> float | None:
        """The share of the matrix products' peak that a step reached; None where sizes or peak are not known.

        See flops.py; the head's products count at supervised tokens only, and embeddings are no product.
        """
        products = self.stats.products
        if products is None or math.isinf(self._peak_flops):
            return None
        sizes = lengths.astype(np.int64)
        flops = products.flops(int(sizes.sum()), supervised, int((sizes * (sizes + 1) // 2).sum()))
        return flops / seconds / self._peak_flops / dist.get_world_size()

    @cached_property
    def _peak_flops(self) -> float:
        """Of this rank's device, FLOP/s: measured on a CPU, after the first step; of a GPU its maker's for bf16."""
        return flops_counter.get_device_flops("B") if self.device == "cuda" else measured_peak_flops(self._computed_in)

    @property
    def _computed_in(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[compute_dtype(self.recipe.fsdp, self.device)]

    def _metrics(self, output: TensorDict | None) -> dict[str, Any]:
        """Of a batch; Megatron has them on one rank of those that share a model only."""
        if self.is_ours:
            return tu.get(output, "metrics")
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, output and tu.get(output, "metrics"))
        return next(found for found in everywhere if found)

    def _validate(self, step: int, examples: Examples, tell: Callable[[int, int], None]) -> dict[str, Any]:
        """Raises _StopRequested, on all ranks, as soon as one of them was asked to stop."""
        budget, ranks = self.recipe.data.token_budget, self._data_ranks

        def progress(done: int, total: int) -> None:
            self.watch.set_phase(f"step {step}: validating, {done} of {total} examples")
            tell(done, total)
            if self._agree().stop:
                raise _StopRequested

        def infer(batch: TensorDict) -> dict[str, Any]:
            return self._metrics(self.training_client.infer_batch(batch))

        result = evaluate(examples, budget, ranks, self._make_batch, infer, progress)
        return {"val/loss": result.loss, "val/tokens": result.tokens}

    def _make_batch(self, examples: Examples, numbers: np.ndarray) -> TensorDict:
        """This rank's share, in the order of its micro-batches; an empty one holds a token that nobody learns."""
        lengths = examples.lengths[numbers]
        plan = plan_micro_batches(lengths.tolist(), self._data_ranks, self.recipe.data.token_budget)
        mine = plan[self.engine.get_data_parallel_rank()]
        filler = (np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.uint8))
        documents = [
            examples[numbers[index]] if index is not None else filler for part in mine for index in part or [None]
        ]
        ids = [torch.from_numpy(ids.astype(np.int64)) for ids, _ in documents]
        masks = [torch.from_numpy(mask.astype(np.int64)) for _, mask in documents]
        positions = [torch.arange(len(part)) for part in ids]
        tensors = {
            name: torch.nested.as_nested_tensor(parts, layout=torch.jagged)
            for name, parts in (("input_ids", ids), ("loss_mask", masks), ("position_ids", positions))
        }
        batch = tu.get_tensordict(tensors, _meta_info(self.recipe, self.prepared.tokenizer.pad_token_id))
        docs = [max(1, len(part)) for part in mine]
        tu.assign_non_tensor(
            batch,
            micro_batch_docs=NonTensorData(docs),
            global_token_num=NonTensorData(lengths.tolist()),
            update_lr_scheduler=not self.is_ours,
        )
        return batch

    def _metadata(
        self, step: int, validation_loss: float | None = None, unvalidated: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a checkpoint's manifest says of the run."""
        return {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": step / self.steps_per_epoch,
            "skipped_steps": self.skipped_steps,
            "validation_loss": validation_loss,
            "unvalidated": unvalidated,
            "world_size": dist.get_world_size(),
            "identity": self.prepared.identity(self.recipe),
            "config": fingerprint(self.recipe.public()),
            "versions": {"sft_recipe": __version__}
            | {name: version(name) for name in ("torch", "verl", "transformers")},
        }

    def _stopped(self, step: int, log: RunLog) -> int:
        log.say(f"Stopped at step {step} of {self.total_steps}. Go on with --resume_from auto.")
        return EXIT_PREEMPTED

    def _is_due(self, every: StepInterval, step: int, is_last: bool) -> bool:
        interval = self.steps_per_epoch if every == AFTER_EACH_EPOCH else int(every)
        return is_last or (interval > 0 and step % interval == 0)

    def _seed_step(self, step: int) -> None:
        """Random state as a function of (seed, step, rank): a resumed run draws what the uninterrupted one would."""
        sequence = np.random.SeedSequence([self._seed, step, self.engine.get_data_parallel_rank()])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def _agree(self, failed_save: bool = False) -> "_Asked":
        """What any rank was asked or knows: ranks hear of it at different moments and must act after one step."""
        ours = [self.requests.wants_stop, self.requests.wants_save, failed_save]
        describe = torch.tensor([int(part) for part in ours], device=self.device)
        dist.all_reduce(describe, op=dist.ReduceOp.MAX)
        return _Asked(*(bool(part) for part in describe.tolist()))

    @property
    def _seed(self) -> int:
        return self.recipe.trainer.seed

    @property
    def _data_ranks(self) -> int:
        return self.engine.get_data_parallel_size()


class _Asked(NamedTuple):
    """Of the run, after a step."""

    stop: bool
    save: bool
    failed_save: bool


class _StopRequested(Exception):
    """ValidationResult was cut short."""


def _meta_info(config: Config, pad_token_id: int | None) -> dict[str, Any]:
    """What verl's engines read beside the tensors; Megatron's plans its own micro-batches under the same budget."""
    return {
        "use_remove_padding": True,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": config.data.token_budget,
        "micro_batch_size_per_gpu": config.data.micro_batch_size_per_gpu,
        "temperature": 1.0,
        "global_batch_size": config.data.train_batch_size,
        "pad_mode": DatasetPadMode.NO_PADDING,
        "pad_token_id": pad_token_id or 0,
    }


def _advice(step: int, config: Config) -> str:
    return (
        f"the gradients of the last {MAX_NONFINITE_STEPS} steps, up to step {step}, were not finite, so nothing is "
        f"learnt any more. Lower the learning rate (now {config.optim.lr:g}), lower GRAD_CLIP, or compute in fp32 "
        "(fsdp.mixed_precision.param_dtype=fp32); the newest checkpoint is from before."
    )


@contextlib.contextmanager
def _silenced_verl() -> Iterator[None]:
    """What verl prints while it builds says nothing to our users; SFT_DEBUG=1 shows it."""
    if is_debugging():
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield
