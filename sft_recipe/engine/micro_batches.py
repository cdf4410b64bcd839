"""The micro-batches of a step, each as one row of tokens with the rows that the loss is computed from."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils

from sft_recipe.engine.attention.prefix_sharing import Segment, concatenate, share_prefixes

# Token ids of a document, and its loss mask; (tokens,).
Document = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """Input and targets of one forward pass.

    `input_ids` and `position_ids` are (1, rows). `positions` (supervised,) are the rows of the tokens before the
    supervised ones, `targets` (supervised,) the supervised tokens. A row is named once for each document in it.
    """

    segments: list[Segment]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def planned_documents(data: TensorDict) -> Iterator[list[Document]]:
    """Yield the documents of each planned micro-batch of this rank."""
    ids, mask = (data[key].values() for key in ("input_ids", "loss_mask"))
    offsets = data["input_ids"].offsets().tolist()
    first = 0
    for count in tensordict_utils.get(data, "micro_batch_docs"):
        spans = itertools.pairwise(offsets[first : first + count + 1])
        yield [(ids[begin:end], mask[begin:end]) for begin, end in spans]
        first += count


def pack(documents: Sequence[Document], shares_prefixes: bool) -> MicroBatch:
    """Return one micro-batch of all `documents`; the first token of a document is never a target."""
    lengths = [len(ids) for ids, _ in documents]
    ids, mask = (torch.cat(parts) for parts in zip(*documents, strict=True))
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    packed = share_prefixes([ids.numpy() for ids, _ in documents]) if shares_prefixes else concatenate(lengths)
    rows = torch.from_numpy(packed.rows)
    tokens = torch.empty(packed.segments[-1].end, dtype=torch.long)  # for each row one of the tokens in it
    tokens[rows] = torch.arange(len(ids))
    supervised = (mask.bool() & (position_ids > 0)).nonzero()[:, 0]
    return MicroBatch(
        segments=packed.segments,
        input_ids=ids[tokens][None],
        position_ids=position_ids[tokens][None],
        positions=rows[supervised - 1],
        targets=ids[supervised],
    )
