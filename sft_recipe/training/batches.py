"""The batch of a step: its examples, and this rank's part of them as the tensors that verl's engines read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode

from sft_recipe.config.schema import Config
from sft_recipe.data.batching import batch_indices, plan_micro_batches
from sft_recipe.data.token_store import Examples

FILLER = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.uint8)  # an unsupervised token, for an empty micro-batch


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

    def indices(self, step: int) -> np.ndarray:
        """Return the indices of the training examples of optimizer step `step` (from 1), int64."""
        data = self.data
        return batch_indices(step - 1, len(self.train), data.train_batch_size, self.seed, data.shuffle)

    def build(self, examples: Examples, indices: np.ndarray) -> TensorDict:
        """Return this rank's part of a batch: jagged tensors, one row a document, in the order of its micro-batches.

            input_ids           a a a a | b b | c c c
            loss_mask           0 0 1 1 | 0 1 | 0 0 1
            position_ids        0 1 2 3 | 0 1 | 0 1 2
            micro_batch_docs    [2, 1]                     the first two rows make the first micro-batch

        All ranks have the same number of micro-batches; one without examples holds an unsupervised token.
        """
        lengths = examples.lengths[indices].tolist()
        plan = plan_micro_batches(lengths, self.ranks, self.data.token_budget, self.packs_documents)
        micro_batches: Sequence[Sequence[int | None]] = plan[self.rank]
        documents = [
            examples[indices[position]] if position is not None else FILLER
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
            global_token_num=NonTensorData(lengths),
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
