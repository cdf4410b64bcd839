"""Statistics of a dataset that are exact over all records, and a sample of conversations."""

import heapq
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from sft_recipe.data.batching import (
    BatchPlan,
    batch_indices,
    plan_micro_batches,
    plan_padded,
    sample_mixture,
    steps_per_epoch,
)
from sft_recipe.data.messages import Conversation
from sft_recipe.data.pretokenized import TokenizedRecord
from sft_recipe.data.preview.selection import Selection
from sft_recipe.data.quality import QualityReport
from sft_recipe.data.remarks import Remarks
from sft_recipe.data.rendering.renderer import Encoded, Renderer, TooLong
from sft_recipe.data.sources import SourceCounts
from sft_recipe.data.tokenize import digest_of, encode_records
from sft_recipe.errors import DataError

CHUNK = 256  # conversations that are rendered and tokenized at a time
EXTREMES = 5  # how many of the longest, the least supervised and the most repeated records are listed
REASONS = 20  # how many errors of rejected records are listed
Record = Conversation | TokenizedRecord | DataError
NO_NUMBER = 2**64 - 1  # marks a source that does not end with a number


@dataclass(frozen=True)
class Settings:
    """The settings that decide how records become training steps; the configuration has the same names."""

    max_length: int = 2048
    max_target_length: int | None = None
    truncation: str = "drop"
    on_bad_record: str = "error"
    batch_size: int = 4
    token_budget: int = 2048
    ranks: int = 1
    seed: int = 42
    order: str = "shuffle"

    @property
    def longest(self) -> int:
        """Return the most tokens of an example, source and target together."""
        return self.max_length + (self.max_target_length or 0)


@dataclass(frozen=True)
class Example:
    """A record and its tokens; `number` is its index among the usable records."""

    number: int
    record: Conversation | TokenizedRecord
    encoded: Encoded

    @property
    def tokens(self) -> int:
        """Return the number of tokens before any truncation."""
        return len(self.encoded.input_ids)

    @property
    def characters(self) -> int:
        """Return the number of characters of its messages' texts, reasoning included; 0 for token ids."""
        return sum(len(message.content or "") + len(message.reasoning or "") for message in self.record.messages)

    @property
    def supervised(self) -> int:
        """Return the number of supervised tokens before any truncation."""
        return int(np.count_nonzero(self.encoded.loss_mask))


@dataclass(frozen=True)
class Truncation:
    """Counts what `max_length` removes.

    `is_too_long` marks the records that are, bool of shape (records,). `records`, `tokens` and `supervised` count what
    is too long and what is removed; `without_target` counts records
    without a supervised token. `lengths` are the tokens of each remaining example, `source_lengths` those of an
    encoder-decoder's source in it, and `numbers` its index among the usable records, int64 of shape (examples,);
    `sources` counts these examples by source.
    """

    is_too_long: np.ndarray
    records: int
    tokens: int
    supervised: int
    without_target: int
    lengths: np.ndarray
    source_lengths: np.ndarray
    numbers: np.ndarray
    sources: list[SourceCounts]


@dataclass(frozen=True)
class Packing:
    """The tokens of one epoch, padded to the longest example of each batch and packed without padding.

    For an encoder-decoder `padded` are those of the padded micro-batches. `capacity` is the token budget of all
    micro-batches together.
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
    selection: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        self._lengths, self._supervised, self._within = array("q"), array("q"), array("q")
        self._characters = array("q")
        self._source_lengths = array("q")  # for encoder-decoder models
        self._digests = array("Q")
        self._record_sources = _SourceList()
        self._sample = _TopExamples(self.show)
        self._longest, self._least_supervised = _TopExamples(EXTREMES), _TopExamples(EXTREMES)
        self._random = random.Random(self.settings.seed)
        self._sources: list[tuple[str, int, Callable[[int], int]]] = []
        self.patterns: Counter[tuple[str, ...]] = Counter()
        self.found = 0  # records that the selection finds
        self.continued = self.repeated_tokens = 0  # of examples from the same record as the one before: split_turns
        self._last_source = ""
        self.special_text = self.dropped_reasoning = self.earlier_without_reasoning = self.joined_starts = 0
        self.remarks = Remarks()
        self.quality = QualityReport()
        self.error_kinds: Counter[str] = Counter()
        self.reasons: list[str] = []

    def read(self, records: Iterable[Record], renderer: Renderer) -> None:
        """Encode and count records; a DataError in their place, or raised by their rendering, counts as rejected."""
        for chunk in chunked(records):
            self.count(chunk, encode_chunk(chunk, renderer))

    def count(self, chunk: list[Record], encoded: list[Encoded | DataError]) -> None:
        """Count records with the results of encode_chunk."""
        for item, result in zip(chunk, encoded, strict=True):
            if isinstance(result, DataError):
                self.reject(result)
            elif not isinstance(item, DataError):
                self.add(item, result)

    def end_source(self, name: str, target_count: Callable[[int], int]) -> None:
        """End a source, which consists of all records since the last call.

        An epoch contains `target_count(n)` of the n examples that the source has after truncation.
        """
        self._sources.append((name, self.records, target_count))

    def add(self, record: Conversation | TokenizedRecord, encoded: Encoded) -> None:
        """Count a record that can be trained on."""
        example = Example(self.records, record, encoded)
        ids, mask = np.asarray(encoded.input_ids, dtype=np.int32), np.asarray(encoded.loss_mask, dtype=np.uint8)
        if record.source and record.source == self._last_source:
            self.continued += 1
            self.repeated_tokens += self._lengths[-1]
        self._last_source = record.source
        self._lengths.append(example.tokens)
        self._supervised.append(example.supervised)
        self._characters.append(example.characters)
        self._within.append(int(np.count_nonzero(mask[: self.settings.max_length])))
        if self.settings.max_target_length is not None:
            self._source_lengths.append(encoded.source_length)
        self._digests.append(digest_of(ids, mask))
        self._record_sources.append(record.source)
        self.special_text += encoded.has_special_text
        self.dropped_reasoning += encoded.drops_reasoning
        self.earlier_without_reasoning += encoded.earlier_without_reasoning
        self.joined_starts += encoded.joined_starts
        self.remarks.add(record, encoded.omits_names)
        self.patterns[roles_of(record)] += 1
        # A random key per record: the sample is uniform and seeded, and that of -n 10 contains that of -n 5.
        key = self._random.random()  # drawn for every record, also where the sample is chosen otherwise
        if self.selection.finds(record):
            sizes = example.tokens, example.supervised
            self._sample.offer(self.selection.key(*sizes) if self.selection.sort else key, example)
            self.found += 1
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
    def characters(self) -> np.ndarray:
        """Return the characters of each record before any truncation, int64."""
        return np.array(self._characters, dtype=np.int64)

    @property
    def sample(self) -> list[Example]:
        """Return the conversations to show, in the order of the data, or in that of the selection."""
        items = self._sample.items
        return items if self.selection.sort else sorted(items, key=lambda example: example.number)

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
        cut, sources = np.minimum(lengths, limit), np.zeros_like(lengths)
        within = np.array(self._within, dtype=np.int64)
        if self.settings.max_target_length is not None:
            whole = np.array(self._source_lengths, dtype=np.int64)
            sources = np.minimum(whole, limit)
            cut = sources + np.minimum(lengths - whole, self.settings.max_target_length)
            within = np.minimum(supervised, cut - sources)
        is_too_long, truncates = lengths > cut, self.settings.truncation == "right"
        remaining = np.where(is_too_long, cut if truncates else 0, lengths)
        targets = np.where(is_too_long, within if truncates else 0, supervised)
        return Truncation(
            is_too_long=is_too_long,
            records=int(is_too_long.sum()),
            tokens=int((lengths - remaining).sum()),
            supervised=int((supervised - targets).sum()),
            without_target=int(((remaining > 0) & (targets == 0)).sum()),
            lengths=remaining[targets > 0],
            source_lengths=sources[targets > 0],
            numbers=np.flatnonzero(targets > 0),
            sources=self._source_counts(targets > 0),
        )

    def _source_counts(self, is_trained: np.ndarray) -> list[SourceCounts]:
        counts, begin = [], 0
        for name, end, target_count in self._sources or [("", self.records, int)]:
            examples = int(is_trained[begin:end].sum())
            counts.append(SourceCounts(name, examples, target_count(examples) if examples else 0))
            begin = end
        return counts

    def epoch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the lengths, source lengths and numbers of the examples of an epoch, before they are shuffled."""
        truncated = self.truncation()
        counts = [(source.examples, source.target_count) for source in truncated.sources if source.examples]
        chosen = sample_mixture(counts, self.settings.seed) if counts else slice(None)
        return truncated.lengths[chosen], truncated.source_lengths[chosen], truncated.numbers[chosen]

    def source_of(self, number: int) -> str:
        """Return where a record was read."""
        return self._record_sources[number]

    def packing(self) -> Packing:
        """Plan the batches and micro-batches of the first epoch as training does."""
        (lengths, sources, _), settings = self.epoch(), self.settings
        steps = padded = micro_batches = 0
        for numbers in epoch_batches(len(lengths), settings):
            batch = lengths[numbers].tolist()
            steps += 1
            plan = list(plan_batch(lengths[numbers], sources[numbers], settings))
            micro_batches += sum(map(len, plan))
            if settings.max_target_length is None:
                padded += max(batch) * len(batch)
                continue
            pair = sources[numbers], (lengths - sources)[numbers]
            rows = [micro_batch for share in plan for micro_batch in share if micro_batch]
            padded += sum(len(group) * int(sum(part[group].max() for part in pair)) for group in rows)
        return Packing(padded, int(lengths.sum()), steps, micro_batches, micro_batches * settings.token_budget)


def roles_of(record: Conversation | TokenizedRecord) -> tuple[str, ...]:
    """Return the roles of a conversation; token ids have the only role `tokens`."""
    return tuple(message.role for message in record.messages) or ("tokens",)


def epoch_batches(examples: int, settings: Settings) -> Iterator[np.ndarray]:
    """Yield the indices of the examples in each step of the first epoch, int64."""
    for step in range(steps_per_epoch(examples, settings.batch_size)):
        yield batch_indices(step, examples, settings.batch_size, settings.seed, settings.order)


def plan_batch(lengths: np.ndarray, sources: np.ndarray, settings: Settings) -> BatchPlan:
    """Return the micro-batches of a step, for examples of these lengths (`sources`: encoder-decoders)."""
    if settings.max_target_length is None:
        return plan_micro_batches(lengths, settings.ranks, settings.token_budget)
    return plan_padded(sources, lengths - sources, settings.ranks, settings.token_budget)


def encode_chunk(chunk: list[Record], renderer: Renderer) -> list[Encoded | DataError]:
    """Return ids and mask of each record, or the DataError of one that cannot be used."""
    encoded = encode_records([item for item in chunk if not isinstance(item, DataError)], renderer, None)
    results = [item if isinstance(item, DataError) else next(encoded) for item in chunk]
    return [result for result in results if not isinstance(result, TooLong)]  # no result is one


def chunked(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield lists of CHUNK records."""
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
