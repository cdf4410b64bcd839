"""The batch of a step: its examples, and this rank's part of them as the tensors that verl's engines read."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode

from sft_recipe.config.schema import Config
from sft_recipe.data.batching import MicroBatch, batch_indices, epoch_order, plan_micro_batches, plan_padded
from sft_recipe.data.notices import idle_notice
from sft_recipe.data.token_store import Examples

FILLER = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.uint8)  # an unsupervised token, for an empty micro-batch


@dataclass(frozen=True)
class RankPlan:
    """A RankPlan has the examples `indices` of a batch, their `lengths`, and the micro-batches of this rank.

    `token_efficiency` are the tokens of the batch as a fraction of those that fit in its time: all ranks take as long
    as the fullest one, and padding takes as long as tokens.
    """

    indices: np.ndarray
    lengths: list[int]
    micro_batches: list[MicroBatch]
    token_efficiency: float


class BatchBuilder:
    """Builds the batches of data rank `rank`, one of `ranks` that share each batch."""

    def __init__(
        self,
        config: Config,
        train: Examples,
        pad_token_id: int | None,
        rank: int,
        ranks: int,
        packs_documents: bool = True,
    ):
        """Without `packs_documents` each micro-batch holds one document."""
        self.data = config.data
        self.seed = config.trainer.seed
        self.train = train
        self.pad_token_id = pad_token_id
        self.rank = rank
        self.ranks = ranks
        self.packs_documents = packs_documents
        self._thread = ThreadPoolExecutor(1, "planning")
        self._planned: dict[int, Future[RankPlan]] = {}

    def notice(self) -> str | None:
        """Return a notice for the user where ranks will wait for the one with the longest example."""
        order = epoch_order(len(self.train), self.seed, 0, self.data.order)
        return idle_notice(self.train.lengths[order], self.data.train_batch_size, self.ranks)

    def plan_ahead(self, step: int) -> None:
        """Plan optimizer step `step` (from 1) in a thread."""
        if step not in self._planned:
            self._planned = {step: self._thread.submit(self._plan_step, step)}

    def plan_step(self, step: int) -> RankPlan:
        """Return the plan of optimizer step `step`; it is ready where it was planned ahead."""
        self.plan_ahead(step)
        return self._planned[step].result()

    def _plan_step(self, step: int) -> RankPlan:
        data = self.data
        indices = batch_indices(step - 1, len(self.train), data.train_batch_size, self.seed, data.order)
        return self.plan(self.train, indices)

    def plan(self, examples: Examples, indices: np.ndarray) -> RankPlan:
        """Return the plan of a batch of these examples."""
        lengths, budget = examples.lengths[indices], self.data.token_budget
        if self.data.has_targets:
            sources = examples.source_lengths[indices]
            plan = plan_padded(sources, lengths - sources, self.ranks, budget)
        else:
            plan = plan_micro_batches(lengths, self.ranks, budget, self.packs_documents)
        efficiency = int(lengths.sum()) / self.ranks / int(plan.loads.max())
        return RankPlan(indices, lengths.tolist(), plan.micro_batches(self.rank), efficiency)

    def plan_and_build(self, examples: Examples, indices: np.ndarray) -> TensorDict:
        """Return this rank's part of a batch of the examples at `indices`."""
        return self.build(examples, self.plan(examples, indices))

    def build(self, examples: Examples, plan: RankPlan) -> TensorDict:
        """Return this rank's part of a batch: jagged tensors, one row a document, in the order of its micro-batches.

            input_ids           a a a a | b b | c c c
            loss_mask           0 0 1 1 | 0 1 | 0 0 1
            position_ids        0 1 2 3 | 0 1 | 0 1 2
            micro_batch_docs    [2, 1]                     the first two rows make the first micro-batch

        A document of an encoder-decoder is its source, with mask 0, and its target, with mask 1. All ranks have the
        same number of micro-batches; one without examples holds an unsupervised token.
        """
        micro_batches: Sequence[Sequence[int | None]] = plan.micro_batches
        documents = [
            examples[plan.indices[position]] if position is not None else FILLER
            for positions in micro_batches
            for position in (positions or [None])
        ]
        ids = [torch.from_numpy(ids.astype(np.int64)) for ids, _ in documents]
        masks = [torch.from_numpy(mask.astype(np.int64)) for _, mask in documents]
        columns = {
            "input_ids": ids,
            "loss_mask": masks,
            "position_ids": [torch.arange(len(document)) for document in ids],
        }
        tensors: dict[str, Any] = {
            name: torch.nested.as_nested_tensor(column, layout=torch.jagged) for name, column in columns.items()
        }
        batch = tu.get_tensordict(tensors, self._settings())
        documents_per_micro_batch = [max(1, len(positions)) for positions in micro_batches]
        tu.assign_non_tensor(
            batch,
            micro_batch_docs=NonTensorData(documents_per_micro_batch),
            global_token_num=NonTensorData(plan.lengths),
        )
        return batch

    def _settings(self) -> dict[str, Any]:
        """What verl's engines read beside the tensors; Megatron's plans its own micro-batches within the budget."""
        return {
            "use_remove_padding": True,
            "use_dynamic_bsz": True,
            "max_token_len_per_gpu": self.data.token_budget,
            "micro_batch_size_per_gpu": self.data.micro_batch_size_per_gpu,
            "temperature": 1.0,
            "global_batch_size": self.data.train_batch_size,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": self.pad_token_id or 0,
        }
