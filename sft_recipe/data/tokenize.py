"""Encodes conversations in chunks, with several processes if there are many; truncates or drops long examples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from sft_recipe.data.messages import Conversation
from sft_recipe.data.pretokenized import TokenizedRecord, check_no_padding, check_vocabulary
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.rendering.renderer import Encoded, Renderer, TooLong
from sft_recipe.data.rendering.source_target import SourceTargetRenderer
from sft_recipe.data.split_turns import group_of
from sft_recipe.data.token_store import StoreOptions, StoreReport
from sft_recipe.data.worker_pool import ordered_results
from sft_recipe.errors import DataError
from sft_recipe.files import digest_number
from sft_recipe.progress import progress_bar

BATCH_CHARACTERS = 1 << 21  # content that is rendered and tokenized at a time

Chunk = list[Conversation | TokenizedRecord | BadRecord]


@dataclass
class EncodedChunk:
    """An EncodedChunk has the examples of some records of one file, in order, and the records that were rejected.

    `ids` are the int32 and `mask` the uint8 values of all examples, concatenated. `lengths` and `supervised` (tokens,
    int64), `digests` (uint64, equal for equal examples) and `groups` (see TokenStore) have shape (examples,).
    """

    ids: bytes
    mask: bytes
    lengths: np.ndarray
    supervised: np.ndarray
    digests: np.ndarray
    groups: np.ndarray
    report: StoreReport
    rejected: list[BadRecord]


def encode_chunks(
    chunks: Iterator[tuple[int, Chunk]],
    renderer: Renderer,
    options: StoreOptions,
    workers: int,
    description: str,
    show_progress: bool,
) -> Iterator[tuple[int, EncodedChunk]]:
    """Yield file number and encoded chunk, in the order of `chunks`, from up to `workers` processes.

    Raises DataError for an example that is too long (if truncation is "error") and for a killed worker.
    """
    _ = renderer.tokenize.token_bytes  # computed once, before the workers are forked
    with (
        ordered_results(partial(_encode_numbered, renderer=renderer, options=options), chunks, workers) as results,
        progress_bar(description, "records", show=show_progress) as advance,
    ):
        for (number, chunk), encoded in results:
            advance(len(chunk))
            yield number, encoded


def _encode_numbered(chunk: tuple[int, Chunk], renderer: Renderer, options: StoreOptions) -> EncodedChunk:
    return _encode(chunk[1], renderer, options)


def _encode(chunk: Chunk, renderer: Renderer, options: StoreOptions) -> EncodedChunk:
    report = StoreReport(records=len(chunk))
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    digests: list[int] = []
    groups: list[int] = []
    rejected = []
    limit = None if options.truncation == "right" else options.max_length
    encoded = encode_records([item for item in chunk if not isinstance(item, BadRecord)], renderer, limit)
    for item in chunk:
        outcome = item.error if isinstance(item, BadRecord) else next(encoded)
        if isinstance(outcome, DataError):
            rejected.append(item if isinstance(item, BadRecord) else BadRecord(outcome, item.as_record()))
            report.rejected[outcome.kind] = report.rejected.get(outcome.kind, 0) + 1
        elif not isinstance(item, BadRecord):
            report.remarks.add(item, isinstance(outcome, Encoded) and outcome.omits_names)
            if isinstance(outcome, TooLong):
                _count_too_long(item.source, outcome, options, report)
            elif example := _admit(item.source, outcome, options, report):
                ids.append(np.asarray(example.input_ids, dtype=np.int32))
                mask.append(np.frombuffer(bytes(example.loss_mask), dtype=np.uint8))
                digests.append(digest_of(ids[-1], mask[-1]))
                groups.append(digests[-1])
                if options.split_turns and isinstance(item, Conversation):
                    groups[-1] = group_of(item)
    lengths = np.asarray([len(values) for values in ids], dtype=np.int64)
    supervised = np.asarray([values.sum() for values in mask], dtype=np.int64)
    report.examples, report.tokens, report.supervised = len(ids), int(lengths.sum()), int(supervised.sum())
    return EncodedChunk(
        _concatenate(ids),
        _concatenate(mask),
        lengths,
        supervised,
        np.asarray(digests, dtype=np.uint64),
        np.asarray(groups, dtype=np.uint64),
        report,
        rejected,
    )


def encode_records(
    records: Iterable[Conversation | TokenizedRecord], renderer: Renderer, limit: int | None
) -> Iterator[Encoded | DataError | TooLong]:
    """Yield the ids and mask of each record, in order; see Renderer.encode_within. Token ids are not rendered."""
    for batch in split_by_size(records):
        conversations = [record for record in batch if isinstance(record, Conversation)]
        rendered = iter(renderer.encode_within(conversations, limit))
        for record in batch:
            yield next(rendered) if isinstance(record, Conversation) else _without_rendering(record, renderer)


def _without_rendering(record: TokenizedRecord, renderer: Renderer) -> Encoded | DataError:
    try:
        check_vocabulary(record, renderer.vocabulary_size)
        pad_id, eos_id = renderer.tokenizer.pad_token_id, renderer.tokenizer.eos_token_id
        check_no_padding(record, pad_id, eos_id, has_targets=isinstance(renderer, SourceTargetRenderer))
    except DataError as error:
        return error
    return Encoded(record.input_ids, record.loss_mask)


def split_by_size(
    records: Iterable[Conversation | TokenizedRecord],
) -> Iterator[list[Conversation | TokenizedRecord]]:
    """Yield records in lists of at most BATCH_CHARACTERS of content, or of one, since encoding takes memory."""
    batch: list[Conversation | TokenizedRecord] = []
    characters = 0
    for record in records:
        if batch and characters + record.size > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(record)
        characters += record.size
    if batch:
        yield batch


def _concatenate(arrays: list[np.ndarray]) -> bytes:
    return b"".join(array.tobytes() for array in arrays)


def digest_of(ids: np.ndarray, mask: np.ndarray) -> int:
    """Return a 64-bit digest of `ids` (int32) and `mask` (uint8), which is equal for equal examples."""
    return digest_number(ids.tobytes() + mask.tobytes())


def _admit(source: str, example: Encoded, options: StoreOptions, report: StoreReport) -> Encoded | None:
    """Return the example, truncated if necessary, or None where it is dropped; count it in the report."""
    length, target = len(example.input_ids), 0
    if options.has_targets:
        length, target = example.source_length, length - example.source_length
    report.longest, report.longest_target = max(report.longest, length), max(report.longest_target, target)
    report.special_text += example.has_special_text
    report.dropped_reasoning += example.drops_reasoning
    report.earlier_without_reasoning += example.earlier_without_reasoning
    report.joined_starts += example.joined_starts
    is_target_too_long = target > (options.max_target_length or 0)
    if length > options.max_length or is_target_too_long:
        report.too_long += 1
        if options.truncation == "error":
            raise (
                _target_too_long(source, target, options)
                if is_target_too_long
                else _too_long(source, f"{length}", options)
            )
        if options.truncation == "drop":
            return None
        example = _cut(example, options)
    if not any(example.loss_mask):
        report.without_target += 1
        return None
    return example


def _cut(example: Encoded, options: StoreOptions) -> Encoded:
    """Cut the end off; a source keeps its last token, which ends every source."""
    ids, limit, kept = example.input_ids, options.max_length, example.source_length
    if kept is None or options.max_target_length is None:
        return Encoded(ids[:limit], example.loss_mask[:limit])
    source, target = ids[:kept], ids[kept:][: options.max_target_length]
    source = source if kept <= limit else [*source[: limit - 1], source[-1]]
    return Encoded([*source, *target], [0] * len(source) + example.loss_mask[kept : kept + len(target)])


def _count_too_long(source: str, example: TooLong, options: StoreOptions, report: StoreReport) -> None:
    if options.truncation == "error":
        raise _too_long(source, f"more than {example.least_tokens}", options)
    report.longest = max(report.longest, example.least_tokens)
    report.too_long += 1
    report.untokenized += 1


def _too_long(source: str, length: str, options: StoreOptions) -> DataError:
    return DataError(
        f"{source}: {length} tokens, longer than max_length={options.max_length}; raise MAX_LENGTH, "
        "or set data.truncation to drop or right"
    )


def _target_too_long(source: str, length: int, options: StoreOptions) -> DataError:
    return DataError(
        f"{source}: the answer has {length} tokens, more than max_target_length={options.max_target_length}; raise "
        "MAX_TARGET_LENGTH, or set data.truncation to drop or right"
    )
