"""The micro-batches of a step, each as one row of tokens with the rows that the loss is computed from."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils

from sft_recipe.engine.attention.prefix_sharing import Pack, Segment, concatenate, share_prefixes


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


def micro_batches(data: TensorDict, shares_prefixes: bool) -> Iterator[MicroBatch]:
    """The planned micro-batches of this rank; the first token of a document is never a target."""
    ids, mask, position_ids = (data[key].values() for key in ("input_ids", "loss_mask", "position_ids"))
    offsets = data["input_ids"].offsets().tolist()
    first = 0
    for count in tensordict_utils.get(data, "micro_batch_docs"):
        begin, end = offsets[first], offsets[first + count]
        lengths = [stop - start for start, stop in itertools.pairwise(offsets[first : first + count + 1])]
        pack = _pack(ids[begin:end].split(lengths), shares_prefixes)
        rows = torch.from_numpy(pack.rows)
        tokens = torch.empty(pack.segments[-1].end, dtype=torch.long)  # for each row one of the tokens in it
        tokens[rows] = torch.arange(begin, end)
        supervised = (mask[begin:end].bool() & (position_ids[begin:end] > 0)).nonzero()[:, 0]
        yield MicroBatch(
            segments=pack.segments,
            input_ids=ids[tokens][None],
            position_ids=position_ids[tokens][None],
            positions=rows[supervised - 1],
            targets=ids[begin + supervised],
        )
        first += count


def _pack(documents: Sequence[torch.Tensor], shares_prefixes: bool) -> Pack:
    if shares_prefixes:
        return share_prefixes([document.numpy() for document in documents])
    return concatenate([len(document) for document in documents])
