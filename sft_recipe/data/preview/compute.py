"""Computes a preview: reads the training data of a configuration as training does, and collects its statistics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sft_recipe.config.schema import Config
from sft_recipe.data.columns import Columns
from sft_recipe.data.messages import Conversation
from sft_recipe.data.pipeline import make_renderer, read_data
from sft_recipe.data.preview.html import excerpt, page
from sft_recipe.data.preview.selection import Selection
from sft_recipe.data.preview.stats import DatasetStats, Record, Settings, chunked, encode_chunk
from sft_recipe.data.quality import KINDS, Problem, QualityChecks, QualityReport
from sft_recipe.data.readers import BadRecord
from sft_recipe.data.rendering.renderer import Encoded, Renderer
from sft_recipe.data.rendering.thinking_mix import mix_notice
from sft_recipe.data.run_inputs import store_options
from sft_recipe.data.sources import Source, resolve_files
from sft_recipe.data.worker_pool import ordered_results
from sft_recipe.distributed.processes import available_cores
from sft_recipe.errors import DataError
from sft_recipe.language import chosen_language, plural
from sft_recipe.models.families import CAUSAL, family_of, fit
from sft_recipe.models.hf_config import load_hf_config
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
        title, language = _title(self.config), chosen_language()
        return page(self.stats, self.renderer, title, self.model, self._excerpts(), language)

    def _excerpts(self) -> dict[str, str]:
        """The starts of the most repeated conversations, by source; the statistics keep their sources alone."""
        missing = {group.sources[0] for group in self.stats.duplicates()[1]}
        excerpts: dict[str, str] = {}
        if not missing:
            return excerpts
        for _, records in _read(self.config, self.sources):
            for record in records:
                if not isinstance(record, DataError) and record.source in missing:
                    excerpts[record.source] = excerpt(record)
                    missing.remove(record.source)
                    if not missing:
                        return excerpts
        return excerpts


def compute_preview(
    config: Config,
    show: int,
    notice: Callable[[str], None],
    selection: Selection = Selection(),  # noqa: B008  # frozen
    checks: QualityChecks | None = None,
) -> Preview:
    """Read and encode all training data, on all cores; the preview shows `show` conversations of the selection, by
    default sampled with trainer.seed. With `checks` the quality of all records is checked, and whether validation
    records are like training records.

    The model's weights are not needed. Raises DataError if no record can be used, ModelError for a model whose
    tokenizer cannot be used. `notice` is called with messages for the user.
    """
    sources = resolve_files(config.data.train_files, config.cache_dir())
    model = resolve_model(config.model, config.cache_dir(), needs_weights=False)
    if model.notice:
        notice(model.notice)
    hf_config = load_hf_config(config.model, model) if (model.folder / "config.json").is_file() else None
    config = fit(config, hf_config) if hf_config else config
    family = family_of(hf_config) if hf_config else CAUSAL  # a folder with a tokenizer alone says nothing else
    tokenizer = load_tokenizer(config.model, resolve_tokenizer(config.model, model, config.cache_dir()), family)
    renderer = make_renderer(tokenizer, store_options(config, hf_config))
    if text := mix_notice(config.data.thinking_mix, tokenizer):
        notice(text)
    selection = replace(selection, decode=lambda ids: str(tokenizer.decode(ids)))
    stats = DatasetStats(_settings(config), show, selection)
    chunks = ((source, chunk) for source, records in _read(config, sources) for chunk in chunked(records))
    workers = config.data.num_workers or available_cores()
    _ = renderer.tokenize.token_bytes  # computed once, before the workers are forked
    with (
        ordered_results(partial(_encode, renderer=renderer), chunks, workers) as results,
        progress_bar("Reading and tokenizing", "records") as advance,
    ):
        done = 0
        for (source, chunk), encoded in results:
            while sources[done] is not source:
                stats.end_source(sources[done].name, sources[done].target_count)
                done += 1
            stats.count(chunk, encoded)
            if checks:
                _check(checks, chunk, encoded, stats.quality)
            advance(len(chunk))
        for source in sources[done:]:
            stats.end_source(source.name, source.target_count)
    if checks:
        _finish_checks(config, checks, stats.quality)
    if not stats.records:
        raise DataError(f"none of the {plural(stats.rejected, 'record')} can be used; first error: {stats.reasons[0]}")
    return Preview(config, sources, renderer, stats, model.name)


def _encode(chunk: tuple[Source, list[Record]], renderer: Renderer) -> list[Encoded | DataError]:
    return encode_chunk(chunk[1], renderer)


def _check(
    checks: QualityChecks, chunk: list[Record], encoded: list[Encoded | DataError], report: QualityReport
) -> None:
    for record, result in zip(chunk, encoded, strict=True):
        if isinstance(record, Conversation) and isinstance(result, Encoded):
            report.add(record.source, checks.check(record))


def _finish_checks(config: Config, checks: QualityChecks, report: QualityReport) -> None:
    """Check the validation records too, and note what was looked for."""
    files = config.data.val_files
    report.kinds = [kind for kind in KINDS if kind != "contaminated" or checks.has_questions]
    report.kinds += ["validation_like_training"] if files else []
    for name in files.values() if isinstance(files, dict) else [files] if files else []:
        for _, records in _read(config, resolve_files(name or [], config.cache_dir())):
            for record in records:
                found = checks.check(record, lambda _: False) if isinstance(record, Conversation) else []
                like = [problem.reason for problem in found if problem.kind == "near_duplicates"]
                report.add(getattr(record, "source", ""), [Problem("validation_like_training", text) for text in like])


def _settings(config: Config) -> Settings:
    data, trainer = config.data, config.trainer
    return Settings(
        max_length=data.max_length,
        max_target_length=data.max_target_length,
        truncation=data.truncation,
        on_bad_record=data.on_bad_record,
        batch_size=data.train_batch_size,
        token_budget=data.token_budget,
        ranks=trainer.world_size,
        seed=trainer.seed,
        order=data.order,
    )


def _read(config: Config, sources: list[Source]) -> Iterator[tuple[Source, Iterator[Record]]]:
    """Each source with its records, a DataError for a record that cannot be used."""
    columns = Columns(config.data.columns, config.data.roles)
    for source in sources:
        yield source, _records(source, config, columns)
    columns.check_all_found()


def _records(source: Source, config: Config, columns: Columns) -> Iterator[Record]:
    for path in source.files:
        data = config.data
        options: dict[str, Any] = dict(
            split=data.split_turns is True, max_chars=data.max_chars, is_encoder_decoder=data.has_targets
        )
        for item in read_data(path, data.format, columns, **options):
            yield item.error if isinstance(item, BadRecord) else item


def _title(config: Config) -> str:
    files = config.data.train_files
    names = [Path(name).name for name in ([files] if isinstance(files, str) else files)]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
