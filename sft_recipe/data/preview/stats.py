"""What training will see of the data: numbers that are exact over all records, and some conversations to look at."""

import heapq
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from sft_recipe.data.batching import batch_indices, plan_micro_batches, sample_mixture, steps_per_epoch
from sft_recipe.data.messages import Conversation
from sft_recipe.data.rendering.renderer import Encoded, Renderer
from sft_recipe.data.sources import SourceCounts
from sft_recipe.data.tokenize import digest_of
from sft_recipe.errors import DataError

CHUNK = 256  # conversations that are rendered and tokenised at a time
EXTREMES = 5  # how many of the longest, the emptiest, and the most repeated records are named
REASONS = 20  # how many rejected records are named
NO_NUMBER = 2**64 - 1


@dataclass(frozen=True)
class Settings:
    """What decides how records become training steps; the configuration has the same names."""

    max_length: int = 2048
    truncation: str = "drop"
    on_bad_record: str = "error"
    batch_size: int = 4
    token_budget: int = 2048
    ranks: int = 1
    seed: int = 42
    shuffle: bool = True


@dataclass(frozen=True)
class Example:
    """A conversation and its tokens; `number` counts the records read, from 0."""

    number: int
    conversation: Conversation
    encoded: Encoded

    @property
    def tokens(self) -> int:
        return len(self.encoded.input_ids)

    @property
    def supervised(self) -> int:
        return int(np.count_nonzero(self.encoded.loss_mask))


@dataclass(frozen=True)
class Truncation:
    """What `max_length` takes away, and what is left to train on.

    `lengths` are tokens per example, int64; `sources` count these examples by source.
    """

    records: int
    tokens: int
    supervised: int
    without_target: int
    lengths: np.ndarray
    sources: list[SourceCounts]


@dataclass(frozen=True)
class Packing:
    """One epoch's tokens if each batch were padded to its longest example, and as they are packed, without padding."""

    padded: int
    packed: int
    steps: int
    micro_batches: int
    capacity: int

    @property
    def saved(self) -> float:
        """The share of the padded tokens that would be padding."""
        return 1 - self.packed / self.padded if self.padded else 0.0


@dataclass(frozen=True)
class Repeated:
    """Conversations with the same tokens and mask: how many, and where the first of them stand."""

    count: int
    places: list[str]


@dataclass
class DatasetStats:
    """Grows by a record at a time. Keeps some 30 bytes of each, and whole conversations only of those to be shown."""

    settings: Settings = field(default_factory=Settings)
    show: int = 5

    def __post_init__(self) -> None:
        self._lengths, self._supervised, self._within = array("q"), array("q"), array("q")
        self._digests = array("Q")
        self._places = _Places()
        self._sample, self._longest, self._emptiest = _Highest(self.show), _Highest(EXTREMES), _Highest(EXTREMES)
        self._random = random.Random(self.settings.seed)
        self._sources: list[tuple[str, int, Callable[[int], int]]] = []
        self.patterns: Counter[tuple[str, ...]] = Counter()
        self.special_text = self.dropped_reasoning = 0
        self.kinds: Counter[str] = Counter()
        self.reasons: list[str] = []

    def read(
        self,
        records: Iterable[Conversation | DataError],
        renderer: Renderer,
        advance: Callable[[int], None] = lambda records: None,
    ) -> None:
        """Render and count records; those that come as, or render to, a DataError are rejected.

        `advance` is told how many more are done.
        """
        for chunk in _chunks(records):
            encoded = iter(renderer.encode_batch([item for item in chunk if isinstance(item, Conversation)]))
            for item in chunk:
                outcome = item if isinstance(item, DataError) else next(encoded)
                if isinstance(outcome, DataError):
                    self.reject(outcome)
                else:
                    self.add(item, outcome)
            advance(len(chunk))

    def end_source(self, name: str, target_count: Callable[[int], int]) -> None:
        """The records since the last end are a source; with n examples left, an epoch holds `wanted(n)` of it."""
        self._sources.append((name, self.records, target_count))

    def add(self, conversation: Conversation, encoded: Encoded) -> None:
        """Count a record that can be trained on."""
        example = Example(self.records, conversation, encoded)
        ids, mask = np.asarray(encoded.input_ids, dtype=np.int32), np.asarray(encoded.loss_mask, dtype=np.uint8)
        self._lengths.append(example.tokens)
        self._supervised.append(example.supervised)
        self._within.append(int(np.count_nonzero(mask[: self.settings.max_length])))
        self._digests.append(digest_of(ids, mask))
        self._places.append(conversation.source)
        self.special_text += encoded.has_special_text
        self.dropped_reasoning += encoded.drops_reasoning
        self.patterns[tuple(message.role for message in conversation.messages)] += 1
        # A random key makes the sample fair, seeded, and that of -n 5 a part of that of -n 10.
        self._sample.offer(self._random.random(), example)
        self._longest.offer(example.tokens, example)
        self._emptiest.offer(-example.supervised, example)

    def reject(self, error: DataError) -> None:
        """Count a record that cannot be trained on."""
        self.kinds[error.kind] += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(str(error))

    @property
    def records(self) -> int:
        return len(self._lengths)

    @property
    def rejected(self) -> int:
        return self.kinds.total()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each record, before any truncation, int64."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def supervised(self) -> np.ndarray:
        """Supervised tokens of each record, before any truncation, int64."""
        return np.array(self._supervised, dtype=np.int64)

    @property
    def sample(self) -> list[Example]:
        """The conversations to show, in the order of the data."""
        return sorted(self._sample.items, key=lambda example: example.number)

    @property
    def longest(self) -> list[Example]:
        """The records of the most tokens."""
        return self._longest.items

    @property
    def emptiest(self) -> list[Example]:
        """The records of the fewest supervised tokens."""
        return self._emptiest.items

    def duplicates(self) -> tuple[int, list[Repeated]]:
        """How many records repeat an earlier one exactly, and the most repeated."""
        digests = np.array(self._digests, dtype=np.uint64)
        values, first, counts = np.unique(digests, return_index=True, return_counts=True)
        # By count, then in the order of the data.
        most = [index for index in np.lexsort((first, -counts))[:EXTREMES] if counts[index] > 1]
        repeated = []
        for index in most:
            numbers = np.flatnonzero(digests == values[index])[:EXTREMES]
            repeated.append(Repeated(int(counts[index]), [self._places[number] for number in numbers]))
        return len(digests) - len(values), repeated

    def truncation(self) -> Truncation:
        """As training does it: `drop` leaves out what is too long, `right` cuts its end, `error` would stop."""
        lengths, supervised, limit = self.lengths, self.supervised, self.settings.max_length
        is_too_long, cuts = lengths > limit, self.settings.truncation == "right"
        left = np.where(is_too_long, limit if cuts else 0, lengths)
        targets = np.where(is_too_long, np.array(self._within, dtype=np.int64) if cuts else 0, supervised)
        return Truncation(
            records=int(is_too_long.sum()),
            tokens=int((lengths - left).sum()),
            supervised=int((supervised - targets).sum()),
            without_target=int(((left > 0) & (targets == 0)).sum()),
            lengths=left[targets > 0],
            sources=self._source_counts(targets > 0),
        )

    def _source_counts(self, is_left: np.ndarray) -> list[SourceCounts]:
        counts, begin = [], 0
        for name, end, target_count in self._sources or [("", self.records, int)]:
            examples = int(is_left[begin:end].sum())
            counts.append(SourceCounts(name, examples, target_count(examples) if examples else 0))
            begin = end
        return counts

    def packing(self) -> Packing:
        """The first epoch's batches, as they are trained."""
        left, settings = self.truncation(), self.settings
        counts = [(share.examples, share.target_count) for share in left.sources if share.examples]
        lengths = left.lengths[sample_mixture(counts, settings.seed)] if counts else left.lengths
        steps = padded = micro_batches = 0
        for numbers in epoch_batches(len(lengths), settings):
            batch = lengths[numbers].tolist()
            steps += 1
            padded += max(batch) * len(batch)
            micro_batches += sum(map(len, plan_micro_batches(batch, settings.ranks, settings.token_budget)))
        return Packing(padded, int(lengths.sum()), steps, micro_batches, micro_batches * settings.token_budget)


def epoch_batches(examples: int, settings: Settings) -> Iterator[np.ndarray]:
    """Example numbers of each step of the first epoch."""
    for step in range(steps_per_epoch(examples, settings.batch_size)):
        yield batch_indices(step, examples, settings.batch_size, settings.seed, settings.shuffle)


def _chunks(records: Iterable[Any]) -> Iterator[list[Any]]:
    records = iter(records)
    while chunk := list(islice(records, CHUNK)):
        yield chunk


class _Highest:
    """The items offered with the highest keys, the highest first; of equal ones the earlier."""

    def __init__(self, size: int):
        self.size = size
        self.heap: list[tuple[float, int, Example]] = []

    def offer(self, key: float, example: Example) -> None:
        heapq.heappush(self.heap, (key, -example.number, example))
        if len(self.heap) > self.size:
            heapq.heappop(self.heap)

    @property
    def items(self) -> list[Example]:
        return [example for _, _, example in sorted(self.heap, reverse=True)]


class _Places:
    """A list of sources in 12 bytes each: `a.json, record 12` is kept as the number of `a.json, record ` and 12."""

    def __init__(self) -> None:
        self.prefixes: dict[str, int] = {}
        self.prefix, self.number = array("I"), array("Q")

    def append(self, source: str) -> None:
        prefix = source.rstrip("0123456789")
        digits = source[len(prefix) :]
        if not digits or digits[0] == "0" or len(digits) > 18:
            prefix, digits = source, str(NO_NUMBER)
        self.prefix.append(self.prefixes.setdefault(prefix, len(self.prefixes)))
        self.number.append(int(digits))

    def __getitem__(self, index: int) -> str:
        prefix = list(self.prefixes)[self.prefix[index]]
        return prefix if self.number[index] == NO_NUMBER else f"{prefix}{self.number[index]}"
