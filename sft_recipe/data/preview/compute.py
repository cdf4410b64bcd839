"""Computes a preview: reads the training data of a configuration as training does, and collects its statistics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sft_recipe.config.schema import Config
from sft_recipe.data.columns import Columns
from sft_recipe.data.messages import Conversation
from sft_recipe.data.pipeline import read_data
from sft_recipe.data.preview.html import excerpt, page
from sft_recipe.data.preview.stats import DatasetStats, Settings
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.run_inputs import store_options
from sft_recipe.data.sources import Source, resolve_files
from sft_recipe.errors import DataError
from sft_recipe.models.resolve import resolve_model, resolve_tokenizer
from sft_recipe.models.tokenizer import load_tokenizer
from sft_recipe.progress import progress_bar


@dataclass(frozen=True)
class Preview:
    """The statistics of a configuration's training data; `model` is the name of the model."""

    config: Config
    sources: list[Source]
    renderer: Renderer
    stats: DatasetStats
    model: str

    @cached_property
    def html(self) -> str:
        """Return the preview as an HTML page. Reads the data again if it has duplicates, to show how they begin."""
        return page(self.stats, self.renderer, _title(self.config), self.model, self._excerpts())

    def _excerpts(self) -> dict[str, str]:
        """The starts of the most repeated conversations, by source; the statistics keep their sources alone."""
        missing = {group.sources[0] for group in self.stats.duplicates()[1]}
        excerpts: dict[str, str] = {}
        if not missing:
            return excerpts
        for _, records in _read(self.config, self.sources):
            for record in records:
                if isinstance(record, Conversation) and record.source in missing:
                    excerpts[record.source] = excerpt(record)
                    missing.remove(record.source)
                    if not missing:
                        return excerpts
        return excerpts


def compute_preview(config: Config, show: int, notice: Callable[[str], None]) -> Preview:
    """Read and encode all training data; the preview shows `show` conversations, sampled with trainer.seed.

    The model's weights are not needed. Raises DataError if no record can be used, ModelError for a model whose
    tokenizer cannot be used. `notice` is called with messages for the user.
    """
    sources = resolve_files(config.data.train_files, config.cache_dir())
    model = resolve_model(config.model, config.cache_dir(), needs_weights=False)
    if model.notice:
        notice(model.notice)
    tokenizer = load_tokenizer(config.model, resolve_tokenizer(config.model, model, config.cache_dir()))
    renderer = Renderer(tokenizer, options=store_options(config.data).render)
    stats = DatasetStats(_settings(config), show)
    with progress_bar("Reading and tokenizing", "records") as advance:
        for source, records in _read(config, sources):
            stats.read(records, renderer, advance)
            stats.end_source(source.name, source.target_count)
    if not stats.records:
        raise DataError(f"none of the {stats.rejected} records can be used; first error: {stats.reasons[0]}")
    return Preview(config, sources, renderer, stats, model.name)


def _settings(config: Config) -> Settings:
    data, trainer = config.data, config.trainer
    return Settings(
        max_length=data.max_length,
        truncation=data.truncation,
        on_bad_record=data.on_bad_record,
        batch_size=data.train_batch_size,
        token_budget=data.token_budget,
        ranks=trainer.world_size,
        seed=trainer.seed,
        shuffle=data.shuffle,
    )


def _read(config: Config, sources: list[Source]) -> Iterator[tuple[Source, Iterator[Conversation | DataError]]]:
    """Each source with its records, a DataError for a record that cannot be used."""
    columns = Columns(config.data.columns)
    for source in sources:
        yield source, _records(source, config.data.format, columns)
    columns.check_all_found()


def _records(source: Source, format: str, columns: Columns) -> Iterator[Conversation | DataError]:
    for path in source.files:
        for item in read_data(path, format, columns):
            yield item.error if isinstance(item, BadRecord) else item


def _title(config: Config) -> str:
    files = config.data.train_files
    names = [Path(name).name for name in ([files] if isinstance(files, str) else files)]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
