"""verl's TrainingWorker as this recipe uses it: built from our configuration, fed with planned batches."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name, get_torch_device
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.losses import sft_loss

from sft_recipe.config.auto import shares_prefixes
from sft_recipe.config.schema import Config
from sft_recipe.engine.generation import greedy
from sft_recipe.engine.model_checks import choose_packing, loss_difference
from sft_recipe.engine.seq2seq_engine import Seq2SeqEngine  # noqa: F401  # registers itself with verl
from sft_recipe.engine.sft_engine import SFTEngine
from sft_recipe.engine.verl_config import build_verl_config
from sft_recipe.errors import is_debugging
from sft_recipe.models.families import family_of
from sft_recipe.models.resolve import ResolvedModel


class Worker:
    """Model, optimizer and learning-rate schedule of this rank, in an engine of verl.

    `engine` is an SFTEngine (FSDP and FSDP2), or verl's Megatron engine, which keeps the schedule by itself and has the
    metrics of a batch on only one of the ranks that share a model. All methods are collective.
    """

    def __init__(
        self, config: Config, model: ResolvedModel, total_steps: int, device: str, on_micro_batch: Callable[[], None]
    ):
        """Load the model. The process group exists already, and `on_micro_batch` is called before each micro-batch.

        Raises ModelError for a model that cannot be loaded completely, or not be trained.
        """
        built = build_verl_config(config, model, total_steps, device)
        with _quiet_stdout():
            self._worker = TrainingWorker(
                TrainingWorkerConfig(
                    model_type=family_of(built.model.hf_config).engine,
                    model_config=built.model,
                    engine_config=built.engine,
                    optimizer_config=built.optim,
                    checkpoint_config=built.checkpoint,
                )
            )
            loss: Any = partial(sft_loss, config=None)  # type: ignore[arg-type]  # as verl's own SFT trainer does
            self._worker.set_loss_fn(loss)  # SFTEngine computes the same loss by itself
            self._worker.reset()
        self.engine: Any = self._worker.engine
        self.is_sft_engine = isinstance(self.engine, SFTEngine)
        if isinstance(self.engine, SFTEngine):
            self.engine.on_micro_batch = on_micro_batch
            if not config.data.has_targets:
                self.engine.use_router_loss(config.model.router_aux_loss_coef)
                # A shared token would count once in the router's loss.
                self.engine.shares_prefixes = shares_prefixes(config, device) and not self.engine.router_coefficient
                choose_packing(self.engine, config.data.token_budget)

    @property
    def data_rank(self) -> int:
        """The number of this rank's share of a batch; ranks that share a sequence or a model have the same one."""
        return self.engine.get_data_parallel_rank()

    @property
    def data_ranks(self) -> int:
        """The number of shares that a batch is split into."""
        return self.engine.get_data_parallel_size()

    @property
    def packs_documents(self) -> bool:
        """Return whether a micro-batch may hold several documents."""
        return not isinstance(self.engine, SFTEngine) or self.engine.packs_documents

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next step uses."""
        return self.engine.optimizer.param_groups[0]["lr"]

    @property
    def loss_scale(self) -> tuple[float, int] | None:
        """The scale of the loss and the steps since it changed, for a checkpoint; None where nothing is scaled."""
        scale = self.engine.loss_scale if self.is_sft_engine else None
        return (scale.value, scale.good_steps) if scale and scale.is_needed else None

    def restore_loss_scale(self, saved: Sequence[Any] | None) -> None:
        """Continue with the `loss_scale` of a checkpoint, where this run scales the loss."""
        if saved and self.loss_scale:
            self.engine.loss_scale.value, self.engine.loss_scale.good_steps = saved

    def set_step(self, step: int) -> None:
        """Set the learning rate to its value after `step` optimizer steps."""
        if self.is_sft_engine:
            self.engine.set_step(step)

    def verify(self, batch: TensorDict) -> float | None:
        """Compare the loss of the first micro-batch with plain transformers; see model_checks.loss_difference.

        Returns None where several ranks share a sequence or a model: nothing is compared then.
        """
        if not isinstance(self.engine, SFTEngine) or self.engine.use_ulysses_sp:
            return None
        return loss_difference(self.engine, batch)

    def train(self, batch: TensorDict) -> dict[str, Any]:
        """Run one optimizer step. Returns verl's metrics: the global `loss`, the `grad_norm` before clipping, ...

        `aux_loss` is the loss of a router, where one is trained.
        """
        tu.assign_non_tensor(batch, update_lr_scheduler=not self.is_sft_engine)
        metrics = self._metrics(self._worker.train_batch(batch))
        return metrics | ({"aux_loss": float(np.mean(metrics["aux_loss"]))} if "aux_loss" in metrics else {})

    def evaluate(self, batch: TensorDict) -> dict[str, Any]:
        """Run a forward pass without gradients. Returns verl's metrics, with the global `loss`.

        `correct` is the number of supervised tokens of all ranks that have the largest logit; None under Megatron.
        """
        metrics = self._metrics(self._worker.infer_batch(batch))
        counts = metrics.get("correct")
        return metrics | {"correct": None if counts is None else int(np.sum(counts))}

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: Sequence[int], tokens: int
    ) -> list[list[int]]:
        """Continue this rank's prompts greedily; see engine.generation.greedy. Not under Megatron."""
        return greedy(self.engine, prompts, max_new_tokens, end_ids, tokens)

    def free_cache(self) -> None:
        """Return memory that is free to the system: after another kind of work steps need blocks of other sizes."""
        get_torch_device().empty_cache()

    def peak_memory(self) -> float:
        """Return the most memory that a rank has had so far, of its GPU or of its process on a CPU; in GiB."""
        peak = torch.tensor(get_torch_device().max_memory_allocated(), device=get_device_name())
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return int(peak) / 2**30

    def _metrics(self, output: TensorDict | None) -> dict[str, Any]:
        if self.is_sft_engine:
            return tu.get(output, "metrics")
        outputs: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outputs, output and tu.get(output, "metrics"))
        return next(metrics for metrics in outputs if metrics)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Discard what verl prints about itself while it builds the engine; SFT_DEBUG=1 shows it."""
    if is_debugging():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
