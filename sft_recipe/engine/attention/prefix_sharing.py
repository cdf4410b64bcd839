"""The documents of a micro-batch, laid out as one row of tokens in which a beginning that several share stands once.

    documents          pack               segments
    S S a a a          S S a a a b b b    rows 0 to 2, nothing before      S S
    S S b b b                             rows 2 to 5, rows 0 to 2 before  a a a
                                          rows 5 to 8, rows 0 to 2 before  b b b

Attention lets a segment see what stands before it, so that each document sees itself alone; all else in a transformer
works on single tokens. What a shared token hands back to the weights is the sum over its documents.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST = 16  # tokens, below which a shared beginning saves less than the handling of it costs


@dataclass(frozen=True)
class Segment:
    """Rows `begin` to `end` of a pack, which continue those of the segments `before`, outermost first."""

    begin: int
    end: int
    prefix: tuple["Segment", ...] = ()

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def position(self) -> int:
        """Of its first token in its documents."""
        return sum(len(segment) for segment in self.prefix)

    def keys(self, end: int, skipped: int = 0) -> list[slice]:
        """The rows that stand before row `end` of this segment in its documents, without the first `skipped`."""
        spans = []
        for begin, stop in (*((segment.begin, segment.end) for segment in self.prefix), (self.begin, end)):
            if skipped < stop - begin:
                spans.append(slice(begin + skipped, stop))
            skipped = max(0, skipped - (stop - begin))
        return spans


@dataclass
class Pack:
    """`segments`, and for each token of each document, one document after the other, the row that it stands in."""

    segments: list[Segment]
    rows: np.ndarray


def concatenate(lengths: Sequence[int]) -> Pack:
    """Whole documents, one after the other."""
    ends = np.cumsum(lengths).tolist()
    segments = [Segment(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    return Pack(segments, np.arange(sum(lengths)))


def share_prefixes(documents: Sequence[np.ndarray]) -> Pack:
    """Documents of token ids, with each beginning of at least `SHORTEST` tokens that several share laid out once.

    What shares a beginning may share a longer one with a few.
    """
    order = sorted(range(len(documents)), key=lambda number: documents[number].tolist())
    shared = [_common(documents[left], documents[right]) for left, right in itertools.pairwise(order)]
    segments: list[Segment] = []
    rows = [np.empty(0, dtype=np.int64)] * len(documents)

    def lay(places: range, prefix: tuple[Segment, ...], rows_before: np.ndarray) -> None:
        """Documents at these places of the order, all of which go on after the tokens at `rows_before`."""
        for part in _alike(places, shared, len(rows_before) + SHORTEST):
            length = min((shared[place] for place in part[:-1]), default=len(documents[order[part[0]]]))
            begin = segments[-1].end if segments else 0
            segments.append(segment := Segment(begin, begin + length - len(rows_before), prefix))
            inside = np.append(rows_before, np.arange(segment.begin, segment.end))
            ending = [place for place in part if len(documents[order[place]]) == length]  # the first of the part
            for place in ending:
                rows[order[place]] = inside
            lay(part[len(ending) :], (*prefix, segment), inside)

    lay(range(len(documents)), (), np.empty(0, dtype=np.int64))
    return Pack(segments, np.concatenate(rows))


def _alike(places: range, shared: Sequence[int], least: int) -> Iterator[range]:
    """Runs of neighbours that share at least so many tokens."""
    begin = places.start
    for place in places:
        if place + 1 == places.stop or shared[place] < least:
            yield range(begin, place + 1)
            begin = place + 1


def _common(left: np.ndarray, right: np.ndarray) -> int:
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    return int(differ.argmax()) if differ.any() else size
