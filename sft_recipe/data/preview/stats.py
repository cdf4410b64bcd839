"""Statistics of a dataset that are exact over all records, and a sample of conversations."""

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
from sft_recipe.data.remarks import Remarks
from sft_recipe.data.rendering.renderer import Encoded, Renderer
from sft_recipe.data.sources import SourceCounts
from sft_recipe.data.tokenize import digest_of, split_by_size
from sft_recipe.errors import DataError

CHUNK = 256  # conversations that are rendered and tokenized at a time
EXTREMES = 5  # how many of the longest, the least supervised and the most repeated records are listed
REASONS = 20  # how many errors of rejected records are listed
NO_NUMBER = 2**64 - 1  # marks a source that does not end with a number


@dataclass(frozen=True)
class Settings:
    """The settings that decide how records become training steps; the configuration has the same names."""

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
    """A conversation and its tokens; `number` is its index among the usable records."""

    number: int
    conversation: Conversation
    encoded: Encoded

    @property
    def tokens(self) -> int:
        """Return the number of tokens before any truncation."""
        return len(self.encoded.input_ids)

    @property
    def supervised(self) -> int:
        """Return the number of supervised tokens before any truncation."""
        return int(np.count_nonzero(self.encoded.loss_mask))


@dataclass(frozen=True)
class Truncation:
    """Counts what `max_length` removes.

    `records`, `tokens` and `supervised` count what is too long and what is removed; `without_target` counts records
    without a supervised token. `lengths` are the tokens of each remaining example, int64 of shape (examples,);
    `sources` counts these examples by source.
    """

    records: int
    tokens: int
    supervised: int
    without_target: int
    lengths: np.ndarray
    sources: list[SourceCounts]


@dataclass(frozen=True)
class Packing:
    """The tokens of one epoch, padded to the longest example of each batch and packed without padding.

    `capacity` is the token budget of all micro-batches together.
    """

    padded: int
    packed: int
    steps: int
    micro_batches: int
    capacity: int

    @property
    def saved(self) -> float:
        """Return the fraction of the padded tokens that is padding."""
        return 1 - self.packed / self.padded if self.padded else 0.0


@dataclass(frozen=True)
class Duplicates:
    """Records with equal tokens and masks: how many there are, and the sources of the first ones."""

    count: int
    sources: list[str]


@dataclass
class DatasetStats:
    """Accumulates records. Keeps about 30 bytes of each, and the conversations of those that are shown or listed."""

    settings: Settings = field(default_factory=Settings)
    show: int = 5

    def __post_init__(self) -> None:
        self._lengths, self._supervised, self._within = array("q"), array("q"), array("q")
        self._digests = array("Q")
        self._record_sources = _SourceList()
        self._sample = _TopExamples(self.show)
        self._longest, self._least_supervised = _TopExamples(EXTREMES), _TopExamples(EXTREMES)
        self._random = random.Random(self.settings.seed)
        self._sources: list[tuple[str, int, Callable[[int], int]]] = []
        self.patterns: Counter[tuple[str, ...]] = Counter()
        self.special_text = self.dropped_reasoning = self.earlier_without_reasoning = 0
        self.remarks = Remarks()
        self.error_kinds: Counter[str] = Counter()
        self.reasons: list[str] = []

    def read(
        self,
        records: Iterable[Conversation | DataError],
        renderer: Renderer,
        advance: Callable[[int], None] = lambda records: None,
    ) -> None:
        """Encode and count records; a DataError in their place, or raised by their rendering, counts as rejected.

        `advance` is called with the number of records done since the last call.
        """
        for chunk in _chunks(records):
            conversations = [item for item in chunk if isinstance(item, Conversation)]
            batches = split_by_size(conversations)
            encoded = (result for batch in batches for result in renderer.encode_batch(batch))
            for item in chunk:
                result = item if isinstance(item, DataError) else next(encoded)
                if isinstance(result, DataError):
                    self.reject(result)
                elif isinstance(item, Conversation):
                    self.add(item, result)
            advance(len(chunk))

    def end_source(self, name: str, target_count: Callable[[int], int]) -> None:
        """End a source, which consists of all records since the last call.

        An epoch contains `target_count(n)` of the n examples that the source has after truncation.
        """
        self._sources.append((name, self.records, target_count))

    def add(self, conversation: Conversation, encoded: Encoded) -> None:
        """Count a record that can be trained on."""
        example = Example(self.records, conversation, encoded)
        ids, mask = np.asarray(encoded.input_ids, dtype=np.int32), np.asarray(encoded.loss_mask, dtype=np.uint8)
        self._lengths.append(example.tokens)
        self._supervised.append(example.supervised)
        self._within.append(int(np.count_nonzero(mask[: self.settings.max_length])))
        self._digests.append(digest_of(ids, mask))
        self._record_sources.append(conversation.source)
        self.special_text += encoded.has_special_text
        self.dropped_reasoning += encoded.drops_reasoning
        self.earlier_without_reasoning += encoded.earlier_without_reasoning
        self.remarks.add(conversation)
        self.patterns[tuple(message.role for message in conversation.messages)] += 1
        # A random key per record: the sample is uniform and seeded, and that of -n 10 contains that of -n 5.
        self._sample.offer(self._random.random(), example)
        self._longest.offer(example.tokens, example)
        self._least_supervised.offer(-example.supervised, example)

    def reject(self, error: DataError) -> None:
        """Count a record that cannot be trained on."""
        self.error_kinds[error.kind] += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(str(error))

    @property
    def records(self) -> int:
        """Return the number of usable records."""
        return len(self._lengths)

    @property
    def rejected(self) -> int:
        """Return the number of records that cannot be used."""
        return self.error_kinds.total()

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each record before any truncation, int64."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def supervised(self) -> np.ndarray:
        """Return the supervised tokens of each record before any truncation, int64."""
        return np.array(self._supervised, dtype=np.int64)

    @property
    def sample(self) -> list[Example]:
        """Return the conversations to show, in the order of the data."""
        return sorted(self._sample.items, key=lambda example: example.number)

    @property
    def longest(self) -> list[Example]:
        """Return the records with the most tokens."""
        return self._longest.items

    @property
    def least_supervised(self) -> list[Example]:
        """Return the records with the fewest supervised tokens."""
        return self._least_supervised.items

    def duplicates(self) -> tuple[int, list[Duplicates]]:
        """Return the number of records that repeat an earlier one exactly, and the most repeated records."""
        digests = np.array(self._digests, dtype=np.uint64)
        values, first, counts = np.unique(digests, return_index=True, return_counts=True)
        # By count, then in the order of the data.
        most = [index for index in np.lexsort((first, -counts))[:EXTREMES] if counts[index] > 1]
        groups = []
        for index in most:
            numbers = np.flatnonzero(digests == values[index])[:EXTREMES]
            groups.append(Duplicates(int(counts[index]), [self._record_sources[number] for number in numbers]))
        return len(digests) - len(values), groups

    def truncation(self) -> Truncation:
        """Apply `max_length` as training does: drop leaves out long examples, right cuts their end, error stops."""
        lengths, supervised, limit = self.lengths, self.supervised, self.settings.max_length
        is_too_long, truncates = lengths > limit, self.settings.truncation == "right"
        remaining = np.where(is_too_long, limit if truncates else 0, lengths)
        targets = np.where(is_too_long, np.array(self._within, dtype=np.int64) if truncates else 0, supervised)
        return Truncation(
            records=int(is_too_long.sum()),
            tokens=int((lengths - remaining).sum()),
            supervised=int((supervised - targets).sum()),
            without_target=int(((remaining > 0) & (targets == 0)).sum()),
            lengths=remaining[targets > 0],
            sources=self._source_counts(targets > 0),
        )

    def _source_counts(self, is_trained: np.ndarray) -> list[SourceCounts]:
        counts, begin = [], 0
        for name, end, target_count in self._sources or [("", self.records, int)]:
            examples = int(is_trained[begin:end].sum())
            counts.append(SourceCounts(name, examples, target_count(examples) if examples else 0))
            begin = end
        return counts

    def packing(self) -> Packing:
        """Plan the batches and micro-batches of the first epoch as training does."""
        truncated, settings = self.truncation(), self.settings
        counts = [(source.examples, source.target_count) for source in truncated.sources if source.examples]
        lengths = truncated.lengths
        if counts:
            lengths = lengths[sample_mixture(counts, settings.seed)]
        steps = padded = micro_batches = 0
        for numbers in epoch_batches(len(lengths), settings):
            batch = lengths[numbers].tolist()
            steps += 1
            padded += max(batch) * len(batch)
            micro_batches += sum(map(len, plan_micro_batches(batch, settings.ranks, settings.token_budget)))
        return Packing(padded, int(lengths.sum()), steps, micro_batches, micro_batches * settings.token_budget)


def epoch_batches(examples: int, settings: Settings) -> Iterator[np.ndarray]:
    """Yield the indices of the examples in each step of the first epoch, int64."""
    for step in range(steps_per_epoch(examples, settings.batch_size)):
        yield batch_indices(step, examples, settings.batch_size, settings.seed, settings.shuffle)


def _chunks(records: Iterable[Any]) -> Iterator[list[Any]]:
    records = iter(records)
    while chunk := list(islice(records, CHUNK)):
        yield chunk


class _TopExamples:
    """The `size` examples with the highest keys, in descending order; of equal keys the earlier example."""

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


class _SourceList:
    """A list of sources in 12 bytes each: `a.json, record 12` is stored as the index of `a.json, record ` and 12."""

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
