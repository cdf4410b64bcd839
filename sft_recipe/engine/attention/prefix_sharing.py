"""A pack: the documents of a micro-batch as one row of tokens, which contains a prefix that several share only once.

    documents          pack               segments
    S S a a a          S S a a a b b b    rows 0 to 2, no prefix            S S
    S S b b b                             rows 2 to 5, prefix: rows 0 to 2  a a a
                                          rows 5 to 8, prefix: rows 0 to 2  b b b

In attention a segment sees itself and its prefix, so that each document sees exactly its own tokens; all other layers
of a transformer work on single tokens. The gradient of a shared token is the sum over its documents.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST = 16  # tokens of a prefix: sharing a shorter one costs more than it saves


@dataclass(frozen=True)
class Segment:
    """Rows `begin` to `end` of a pack, which continue the segments of `prefix`, first to last."""

    begin: int
    end: int
    prefix: tuple["Segment", ...] = ()

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def position(self) -> int:
        """Return the position of its first token in its documents."""
        return sum(len(segment) for segment in self.prefix)

    def keys(self, end: int, skipped: int = 0) -> list[slice]:
        """The rows before row `end` of this segment in its documents, without the first `skipped`."""
        spans = []
        for begin, stop in (*((segment.begin, segment.end) for segment in self.prefix), (self.begin, end)):
            if skipped < stop - begin:
                spans.append(slice(begin + skipped, stop))
            skipped = max(0, skipped - (stop - begin))
        return spans


@dataclass
class Pack:
    """`segments`, and the row of each token of each document, one document after the other; (tokens,)."""

    segments: list[Segment]
    rows: np.ndarray


def concatenate(lengths: Sequence[int]) -> Pack:
    """A pack of documents of these lengths, one after the other, without sharing."""
    ends = np.cumsum(lengths).tolist()
    segments = [Segment(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    return Pack(segments, np.arange(sum(lengths)))


def share_prefixes(documents: Sequence[np.ndarray]) -> Pack:
    """A pack of documents of token ids that contains each common prefix of at least `SHORTEST` tokens once.

    Documents with a common prefix may share a longer one with some of the others.
    """
    order = sorted(range(len(documents)), key=lambda number: documents[number].tolist())
    shared = [_common(documents[left], documents[right]) for left, right in itertools.pairwise(order)]
    segments: list[Segment] = []
    rows = [np.empty(0, dtype=np.int64)] * len(documents)

    def add(indices: range, prefix: tuple[Segment, ...], rows_before: np.ndarray) -> None:
        """Add the documents at these indices of the order, which all continue the tokens at `rows_before`."""
        for part in _runs(indices, shared, len(rows_before) + SHORTEST):
            length = min((shared[index] for index in part[:-1]), default=len(documents[order[part[0]]]))
            begin = segments[-1].end if segments else 0
            segments.append(segment := Segment(begin, begin + length - len(rows_before), prefix))
            rows_so_far = np.append(rows_before, np.arange(segment.begin, segment.end))
            ending = [index for index in part if len(documents[order[index]]) == length]  # the first of the part
            for index in ending:
                rows[order[index]] = rows_so_far
            add(part[len(ending) :], (*prefix, segment), rows_so_far)

    add(range(len(documents)), (), np.empty(0, dtype=np.int64))
    return Pack(segments, np.concatenate(rows))


def _runs(indices: range, shared: Sequence[int], minimum: int) -> Iterator[range]:
    """Runs of neighbors that share at least `minimum` tokens."""
    begin = indices.start
    for index in indices:
        if index + 1 == indices.stop or shared[index] < minimum:
            yield range(begin, index + 1)
            begin = index + 1


def _common(left: np.ndarray, right: np.ndarray) -> int:
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    return int(differ.argmax()) if differ.any() else size
