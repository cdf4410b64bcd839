"""The statistics of a run's training data: for the banner, and as data.json in the run folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from sft_recipe import FORMAT_VERSION

if TYPE_CHECKING:  # with it comes the tokenizers' library, which a report does not need
    from sft_recipe.data.token_store import Examples

FILE = "data.json"
SAMPLE = 2000  # examples whose ends are read, spread evenly; reading all of large data would delay the first step


@dataclass(frozen=True)
class DataStatistics:
    """DataStatistics count `examples` and their tokens; `lengths` are tokens at the quantiles median, p95 and max.

    `repeated` examples equal an earlier one. Of `records`, before mixing and splitting, `dropped` were longer than the
    limit and left out, `cut` were longer and cut off at their end, and `without_target` had no supervised token. Of
    `sampled` examples, `without_end` have no end token that is supervised.
    """

    examples: int
    tokens: int
    supervised: int
    lengths: dict[str, int]
    repeated: int
    records: int
    dropped: int
    cut: int
    without_target: int
    sampled: int
    without_end: int

    def to_json(self) -> str:
        """Return the text of data.json."""
        return json.dumps(asdict(self) | {"format_version": FORMAT_VERSION}, indent=2) + "\n"


def data_statistics(train: Examples, truncation: str, end_ids: Collection[int]) -> DataStatistics:
    """Return the statistics of examples that end with one of `end_ids`, too long ones treated by `truncation`."""
    report, lengths = train.store.report, np.sort(train.lengths)
    sample = np.unique(np.linspace(0, len(train) - 1, min(SAMPLE, len(train))).astype(int))
    return DataStatistics(
        examples=len(train),
        tokens=int(lengths.sum()),
        supervised=train.supervised,
        lengths={name: int(lengths[int(part * (len(lengths) - 1))]) for name, part in (("median", 0.5), ("p95", 0.95))}
        | {"max": int(lengths[-1])},
        repeated=len(train) - len(np.unique(train.store.digests[train.numbers])),
        records=report.records,
        dropped=report.too_long if truncation == "drop" else 0,
        cut=report.too_long if truncation == "right" else 0,
        without_target=report.without_target,
        sampled=len(sample),
        without_end=sum(end_token(*train[int(index)], end_ids) not in end_ids for index in sample),
    )


def end_token(ids: np.ndarray, mask: np.ndarray, special_ids: Collection[int]) -> int:
    """Return the token that ends an example: the last one with a loss, or the special one that it follows.

    Where the loss is on the white space after the end of a turn as well, the end is the token before it.
    """
    *before, last = ids[np.flatnonzero(mask)[-2:]].tolist()
    return before[0] if before and last not in special_ids and before[0] in special_ids else last
