"""The path of the data from files to the token store, top to bottom; each stage is called once.

sources.resolve_files      paths, globs, hub data sets  -> files
readers.read_records       file                         -> records
Columns.rename             record                       -> record with our field names
formats.convert            record                       -> Conversation, or TokenizedRecord
split_turns                Conversation                 -> one per assistant turn (data.split_turns)
Renderer.encode_within     conversations                -> ids and mask     (in tokenize, in several processes)
tokenize._admit            ids and mask                 -> truncated, or dropped
store_writer.StoreWriter   ids and mask                 -> files of the store
token_store.TokenStore     files of the store           -> examples by index
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.columns import Columns
from sft_recipe.data.formats import convert, select_formats
from sft_recipe.data.messages import Conversation
from sft_recipe.data.pretokenized import TokenizedRecord
from sft_recipe.data.readers import BadRecord, read_records
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.rendering.source_target import SourceTargetRenderer
from sft_recipe.data.split_turns import split_turns
from sft_recipe.data.store_eviction import evict_stores, mark_used
from sft_recipe.data.store_writer import StoreWriter, partial_folder, publish
from sft_recipe.data.token_store import DAMAGE, REJECTED, StoreOptions, StoreReport, TokenStore, store_key
from sft_recipe.data.tokenize import Chunk, EncodedChunk, encode_chunks
from sft_recipe.distributed.processes import available_cores
from sft_recipe.errors import DataError, notify
from sft_recipe.language import plural

CHUNK_RECORDS = 512  # records that a worker encodes at a time
CHUNK_CHARACTERS = 1 << 26  # after which a chunk ends earlier; the digest of a store depends on where chunks end
MAX_OTHER_ERRORS = 20  # bad records shown after the first
LOOK_AHEAD = 10_000  # records read after the first bad one, to show others with it


def open_store(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    options: StoreOptions,
    cache_dir: Path,
    workers: int | None = None,
    show_progress: bool = False,
) -> TokenStore:
    """Return the token store of these files (see sources.resolve_files), building it if it does not exist yet.

    Raises DataError: a bad record (unless `on_bad_record` is skip); every example longer than `max_length`; no
    supervised token; a full disk. Raises ModelError: a tokenizer for which no mask can be made.
    """
    renderer = make_renderer(tokenizer, options)  # raises for a slow tokenizer, for which there is no key
    folder = cache_dir / "tokens" / store_key(files, tokenizer, options)
    try:
        store = TokenStore.open(folder)
        mark_used(folder)
        return store
    except DAMAGE:
        pass
    try:
        with partial_folder(folder) as partial:
            build_store(partial, files, renderer, options, workers or available_cores(), show_progress)
            publish(partial, folder)
        store = TokenStore.open(folder)
        evict_stores(folder.parent)
        return store
    except OSError as error:
        raise DataError(f"the token store cannot be written to {folder.parent}: {error.strerror or error}") from None


def make_renderer(tokenizer: PreTrainedTokenizerBase, options: StoreOptions) -> Renderer:
    """Return the renderer of examples with these options. Raises ModelError for a tokenizer that it cannot use."""
    if not options.has_targets:
        return Renderer(tokenizer, options=options.render)
    return SourceTargetRenderer(tokenizer, options=options.render, decoder_start_id=options.decoder_start_id)


def build_store(
    folder: Path, files: Sequence[Path], renderer: Renderer, options: StoreOptions, workers: int, show_progress: bool
) -> None:
    """Build the store of these files in a folder, after what an interrupted build has left there.

    Raises DataError and OSError.
    """
    columns = Columns(options.columns, options.roles)
    bad_records = _BadRecords(options.on_bad_record == "skip", folder / REJECTED)
    description = "Tokenizing " + ", ".join(path.name for path in files[:3])
    chunks = _read_chunks(files, options, columns)
    with StoreWriter(folder, len(files)) as writer:
        if writer.chunks:
            done = plural(writer.report.records, "record")
            notify(f"{description}: continuing after {done}, where it was interrupted")
        for _ in islice(chunks, writer.chunks):
            pass
        for number, chunk in encode_chunks(chunks, renderer, options, workers, description, show_progress):
            bad_records.add(chunk)
            writer.add(number, chunk)
            if not bad_records.errors:
                writer.save_progress()
        bad_records.raise_errors()
        columns.check_all_found()
        _check_not_empty(writer.report, files, options)
        writer.finish()


def _read_chunks(files: Sequence[Path], options: StoreOptions, columns: Columns) -> Iterator[tuple[int, Chunk]]:
    for number, path in enumerate(files):
        items = read_data(
            path,
            options.format,
            columns,
            split=options.split_turns,
            max_chars=options.max_chars,
            is_encoder_decoder=options.has_targets,
        )
        while chunk := _read_chunk(items):
            yield number, chunk


def _read_chunk(items: Iterator[Conversation | TokenizedRecord | BadRecord]) -> Chunk:
    """Return the next records, fewer if they are long."""
    chunk: Chunk = []
    characters = 0
    for item in islice(items, CHUNK_RECORDS):
        chunk.append(item)
        characters += 0 if isinstance(item, BadRecord) else item.size
        if characters > CHUNK_CHARACTERS:
            break
    return chunk


def read_data(
    path: Path,
    format: str = "auto",
    columns: Columns | None = None,
    *,
    split: bool = False,
    max_chars: int | None = None,
    is_encoder_decoder: bool = False,
) -> Iterator[Conversation | TokenizedRecord | BadRecord]:
    """Yield the conversations and records of token ids of a file; for a record that cannot be used yield a BadRecord.

    With `split` there is one for each assistant turn that is trained on. Messages are cut to `max_chars` characters.
    `is_encoder_decoder` says which models token ids are for. Raises DataError for an unknown format, and for a file
    that cannot be used or cannot be read further.
    """
    columns = columns or Columns()
    formats = select_formats(format)
    for location, record in read_records(path):
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            item = convert(columns.rename(record, location), location, formats, is_encoder_decoder)
            if max_chars and isinstance(item, Conversation):
                item = item.cut(max_chars)
        except DataError as error:
            yield BadRecord(error, record)
            continue
        yield from split_turns(item) if split and isinstance(item, Conversation) else [item]


class _BadRecords:
    """Writes bad records to a file if they are skipped; else collects the first few of them for one error."""

    def __init__(self, skip: bool, path: Path):
        self.skip, self.path = skip, path
        self.errors: list[DataError] = []
        self.records_after_first = 0

    def add(self, chunk: EncodedChunk) -> None:
        if self.skip and chunk.rejected:
            with self.path.open("ab") as file:
                file.writelines(rejected.as_line() for rejected in chunk.rejected)
        if self.skip:
            return
        self.errors += [rejected.error for rejected in chunk.rejected]
        self.records_after_first += chunk.report.records if self.errors else 0
        if len(self.errors) > MAX_OTHER_ERRORS or self.records_after_first >= LOOK_AHEAD:
            self.raise_errors()

    def raise_errors(self) -> None:
        """Raises DataError if there was a bad record."""
        if not self.errors:
            return
        lines = [str(self.errors[0])]
        if others := self.errors[1 : MAX_OTHER_ERRORS + 1]:
            more = "More than " if len(self.errors) > MAX_OTHER_ERRORS + 1 else ""
            lines += [
                f"{more}{plural(len(others), 'other record')} cannot be used either:",
                *(f"  - {error}" for error in others),
            ]
        lines.append("data.on_bad_record=skip leaves such records out, counts them and writes them to a file.")
        raise DataError("\n".join(lines), self.errors[0].kind)


def _check_not_empty(report: StoreReport, files: Sequence[Path], options: StoreOptions) -> None:
    if report.examples:
        return
    names = ", ".join(path.name for path in files)
    usable = report.records - sum(report.rejected.values())
    if not usable:
        raise DataError(
            f"{names}: none of the {plural(report.records, 'record')} can be used ({report.rejected_kinds})"
        )
    if report.too_long == usable:
        limits, longest = f"max_length={options.max_length} tokens", f"the longest has {report.longest_text}"
        advice = f"set MAX_LENGTH to {report.longest_text}"
        if options.has_targets:
            limits = f"max_length={options.max_length} (source) or max_target_length={options.max_target_length} tokens"
            longest = f"the longest have {report.longest} and {report.longest_target}"
            advice = "set MAX_LENGTH and MAX_TARGET_LENGTH to these"
        if options.truncation == "drop":
            advice += ", or data.truncation=right to cut off their ends"
        raise DataError(
            f"{names}: none of the {plural(usable, 'example')} fits {limits} ({longest}) and nothing is left to train "
            f"on; {advice}"
        )
    raise DataError(
        f"{names}: no token is supervised in any of the {plural(usable, 'record')}; there is nothing to train on"
    )
