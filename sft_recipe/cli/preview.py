"""What scripts/preview_data.py runs: train.sh's flags, variables and overrides -> a preview of the training data.

Needs nothing but the standard library until a configuration is composed, so that --help works before the set-up.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe.cli.train import FLAGS, parse
from sft_recipe.errors import ConfigError, DataError, PreflightError, RecipeError, is_debugging

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_recipe.config.schema import Config
    from sft_recipe.data.formats import Columns
    from sft_recipe.data.messages import Conversation
    from sft_recipe.data.preview.stats import DatasetStats
    from sft_recipe.data.rendering.renderer import Renderer
    from sft_recipe.data.sources import Source

SHOWN = 5


def help_text() -> str:
    """The preview's own flags, and those of train.sh that decide what is seen."""
    lines = [
        "usage: scripts/preview_data.py [-n 5] [--html FILE] [TRAIN.SH'S FLAGS] [HYDRA OVERRIDES]",
        "",
        "Shows what training will see of the data: which tokens are supervised, how long the records are, what",
        "MAX_LENGTH cuts, what repeats. Reads all of it, trains nothing.",
        "",
        "flags:",
        f"  {'-n NUMBER':<26} conversations to show, drawn by trainer.seed (default: {SHOWN})",
        f"  {'--html FILE':<26} write one self-contained page as well",
    ]
    for flag in FLAGS:
        if flag.key.startswith(("model.", "data.")) and flag.name != "val_data":
            names = f"--{flag.short}, --{flag.name}" if flag.short else f"--{flag.name}"
            lines.append(f"  {names:<26} {flag.help} (default: {flag.default}; {flag.key})")
    lines += [
        f"  {'-h, --help':<26} this text",
        "",
        "All other flags, variables and overrides of ./train.sh are understood and mean the same.",
        "Through a pipe, where colours are lost, supervised text stands in ⟦ ⟧; in colour: FORCE_COLOR=1 ... | less -R",
    ]
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    try:
        show, html, rest = _own_flags(args)
        line = parse(rest, os.environ)
        if line.help:
            print(help_text())
            return 0
        from sft_recipe.config.compose import load_config, parse_config_args

        config = load_config(line.overrides, **parse_config_args(line.config_args))
        if html:
            _check_writable(html)
        _preview(config, show, html)
        return 0
    except RecipeError as error:
        if is_debugging():
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _own_flags(args: list[str]) -> tuple[int, Path | None, list[str]]:
    """-n and --html, and what is left for train.sh's parser."""
    own: dict[str, str] = {}
    rest = []
    words = iter(args)
    for word in words:
        name, has_value, value = word.partition("=")
        if name in ("-n", "--html"):
            own[name] = value if has_value else next(words, "")
            if not own[name] or own[name].startswith("--"):
                raise ConfigError(f"{name} needs a value")
        else:
            rest.append(word)
    number = own.get("-n", str(SHOWN))
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(f"-n {number}: expected a number of conversations, 0 or more")
    return int(number), Path(own["--html"]).expanduser() if "--html" in own else None, rest


def _preview(config: Config, show: int, html: Path | None) -> None:
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from rich.console import Console

    from sft_recipe.data.preview.terminal import print_preview
    from sft_recipe.data.rendering.renderer import Renderer
    from sft_recipe.data.run_inputs import store_options
    from sft_recipe.data.sources import resolve_files

    sources = resolve_files(config.data.train_files, config.cache_dir())
    tokenizer, model = _load_tokenizer(config)
    renderer = Renderer(tokenizer, options=store_options(config.data).render)
    stats = _compute_stats(config, sources, renderer, show)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that knows no ⏎
    print_preview(stats, renderer, Console(highlight=False))
    if html:
        from sft_recipe.data.preview.html import page

        text = page(stats, renderer, _title(config), model, _excerpts(config, sources, stats))
        try:
            html.write_text(text, encoding="utf-8")
        except OSError as error:
            raise PreflightError(f"{html} cannot be written: {error.strerror}") from None
        print(f"page: {html}")


def _load_tokenizer(config: Config) -> tuple[PreTrainedTokenizerBase, str]:
    """As training loads it, but without the model's weights; and the name of the model."""
    from sft_recipe.data.run_inputs import load_tokenizer
    from sft_recipe.models.resolve import resolve_model, resolve_tokenizer

    model = resolve_model(config.model, config.cache_dir(), needs_weights=False)
    if model.notice:
        print(model.notice, file=sys.stderr)
    return load_tokenizer(config.model, resolve_tokenizer(config.model, model, config.cache_dir())), model.name


def _read(config: Config, sources: list[Source]) -> Iterator[tuple[Source, Iterator[Conversation | DataError]]]:
    """The training data as training reads it; a record that cannot be used comes as the error that says why."""
    from sft_recipe.data.formats import Columns

    columns = Columns(config.data.columns)
    for source in sources:
        yield source, _records(source, config.data.format, columns)
    columns.check_all_found()


def _records(source: Source, format: str, columns: Columns) -> Iterator[Conversation | DataError]:
    from sft_recipe.data.formats import read_data
    from sft_recipe.data.readers import BadRecord

    for path in source.files:
        for item in read_data(path, format, columns):
            yield item.error if isinstance(item, BadRecord) else item


def _compute_stats(config: Config, sources: list[Source], renderer: Renderer, show: int) -> DatasetStats:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from sft_recipe.data.preview.stats import DatasetStats, Settings

    data, trainer = config.data, config.trainer
    settings = Settings(
        max_length=data.max_length,
        truncation=data.truncation,
        on_bad_record=data.on_bad_record,
        batch_size=data.train_batch_size,
        token_budget=data.token_budget,
        ranks=trainer.world_size,
        seed=trainer.seed,
        shuffle=data.shuffle,
    )
    stats = DatasetStats(settings, show)
    console = Console(stderr=True)
    count = TextColumn("{task.completed:,} records")
    columns = (SpinnerColumn(), TextColumn("Reading and tokenising"), BarColumn(), count, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        for source, records in _read(config, sources):
            stats.read(records, renderer, lambda count: progress.advance(task, count))
            stats.end_source(source.name, source.target_count)
    if not stats.records:
        raise DataError(f"none of the {stats.rejected} records can be used; the first: {stats.reasons[0]}")
    return stats


def _excerpts(config: Config, sources: list[Source], stats: DatasetStats) -> dict[str, str]:
    """How the most repeated conversations begin, from a second look into the files; only their places were kept."""
    from sft_recipe.data.preview.html import excerpt

    target_count = {group.places[0] for group in stats.duplicates()[1]}
    found: dict[str, str] = {}
    records = (record for _, records in _read(config, sources) for record in records) if target_count else iter(())
    while len(found) < len(target_count):
        record = next(records)
        if not isinstance(record, DataError) and record.source in target_count:
            found[record.source] = excerpt(record)
    return found


def _title(config: Config) -> str:
    files = config.data.train_files
    names = [Path(name).name for name in ([files] if isinstance(files, str) else files)]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_writable(html: Path) -> None:
    """Told before minutes of tokenising rather than after."""
    if html.is_dir():
        raise PreflightError(f"--html {html} is a directory; name a file in it")
    if not html.absolute().parent.is_dir():
        raise PreflightError(f"--html {html}: there is no folder {html.absolute().parent}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main(sys.argv[1:]))
