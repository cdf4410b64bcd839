"""The path of the data from files to the token store, top to bottom; each stage is called once.

sources.resolve_files      paths, globs, hub data sets  -> files
readers.read_records       file                         -> records
Columns.rename             record                       -> record with our field names
formats.to_conversation    record                       -> Conversation
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
from sft_recipe.data.formats import select_formats, to_conversation
from sft_recipe.data.messages import Conversation
from sft_recipe.data.readers import BadRecord, read_records
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.store_writer import StoreWriter, partial_folder, publish
from sft_recipe.data.token_store import DAMAGE, REJECTED, StoreOptions, StoreReport, TokenStore, store_key
from sft_recipe.data.tokenize import Chunk, EncodedChunk, encode_chunks
from sft_recipe.distributed.processes import available_cores
from sft_recipe.errors import DataError

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
    renderer = Renderer(tokenizer, options=options.render)  # raises for a slow tokenizer, for which there is no key
    folder = cache_dir / "tokens" / store_key(files, tokenizer, options)
    try:
        return TokenStore.open(folder)
    except DAMAGE:
        pass
    try:
        with partial_folder(folder) as partial:
            build_store(partial, files, renderer, options, workers or available_cores(), show_progress)
            publish(partial, folder)
        return TokenStore.open(folder)
    except OSError as error:
        raise DataError(f"the token store cannot be written to {folder.parent}: {error.strerror or error}") from None


def build_store(
    folder: Path, files: Sequence[Path], renderer: Renderer, options: StoreOptions, workers: int, show_progress: bool
) -> None:
    """Build the store of these files in an empty folder. Raises DataError and OSError."""
    columns = Columns(options.columns)
    bad_records = _BadRecords(options.on_bad_record == "skip", folder / REJECTED)
    description = "Tokenizing " + ", ".join(path.name for path in files[:3])
    chunks = _read_chunks(files, options.format, columns)
    with StoreWriter(folder, len(files)) as writer:
        for number, chunk in encode_chunks(chunks, renderer, options, workers, description, show_progress):
            bad_records.add(chunk)
            writer.add(number, chunk)
        bad_records.raise_errors()
        columns.check_all_found()
        _check_not_empty(writer.report, files, options)
        writer.finish()


def _read_chunks(files: Sequence[Path], format: str, columns: Columns) -> Iterator[tuple[int, Chunk]]:
    for number, path in enumerate(files):
        items = read_data(path, format, columns)
        while chunk := _read_chunk(items):
            yield number, chunk


def _read_chunk(items: Iterator[Conversation | BadRecord]) -> Chunk:
    """Return the next records, fewer if they are long."""
    chunk: Chunk = []
    characters = 0
    for item in islice(items, CHUNK_RECORDS):
        chunk.append(item)
        characters += item.size if isinstance(item, Conversation) else 0
        if characters > CHUNK_CHARACTERS:
            break
    return chunk


def read_data(path: Path, format: str = "auto", columns: Columns | None = None) -> Iterator[Conversation | BadRecord]:
    """Yield the conversations of a file; for a record that cannot be used yield a BadRecord, and go on reading.

    Raises DataError for an unknown format, and for a file that cannot be used or cannot be read further.
    """
    columns = columns or Columns()
    formats = select_formats(format)
    for location, record in read_records(path):
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            yield to_conversation(columns.rename(record, location), location, formats)
        except DataError as error:
            yield BadRecord(error, record)


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
                f"{more}{len(others)} other records cannot be used either:",
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
        raise DataError(f"{names}: none of the {report.records} records can be used ({report.rejected_kinds})")
    if report.too_long == usable:
        advice = f"set MAX_LENGTH to {report.longest_text}" + (
            ", or data.truncation=right to cut off their ends" if options.truncation == "drop" else ""
        )
        raise DataError(
            f"{names}: all {usable} examples are longer than max_length={options.max_length} tokens "
            f"(the longest has {report.longest_text}) and nothing is left to train on; {advice}"
        )
    raise DataError(f"{names}: no token is supervised in any of the {usable} records; there is nothing to train on")
