"""scripts/preview_data.py: shows the training data that train.sh's flags, variables and overrides select.

Until the configuration is composed it uses only the standard library, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import FLAGS, Flag, Parser, parse
from sft_recipe.errors import DataError, PreflightError, run_command, silence_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_recipe.config.schema import Config
    from sft_recipe.data.formats import Columns
    from sft_recipe.data.messages import Conversation
    from sft_recipe.data.preview.stats import DatasetStats
    from sft_recipe.data.rendering.renderer import Renderer
    from sft_recipe.data.sources import Source

SHOWN = 5
USAGE = "scripts/preview_data.py [-n 5] [--html FILE] [TRAIN.SH'S FLAGS] [HYDRA OVERRIDES]"
DESCRIPTION = """\
Shows the training data as training uses it: which tokens are supervised, how long the records are,
what MAX_LENGTH cuts, what is duplicated. Reads all records and trains nothing."""
EPILOG = """\
All other flags, environment variables and overrides of ./train.sh are accepted and mean the same.
Through a pipe, where colors are lost, supervised text is marked by ⟦ ⟧; in color: FORCE_COLOR=1 ... | less -R"""


def preview_parser() -> Parser:
    """Return the parser of the preview's own flags; `parse` adds those of train.sh."""
    parser = Parser(USAGE, DESCRIPTION, EPILOG)
    parser.add_argument(
        "-n",
        dest="count",
        type=_count,
        default=SHOWN,
        metavar="NUMBER",
        help=f"conversations to show, sampled with trainer.seed (default: {SHOWN})",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a self-contained HTML page")
    return parser


def shown_flags() -> list[Flag]:
    """Return the flags of train.sh that change the preview, for --help."""
    return [flag for flag in FLAGS if flag.key.startswith(("model.", "data.")) and flag.name != "val_data"]


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: _run(args))


def _run(args: list[str]) -> int:
    line = parse(args, os.environ, preview_parser(), shown_flags())
    from sft_recipe.config.compose import load_config, parse_config_args

    config = load_config(line.overrides, **parse_config_args(line.config_args))
    html = line.options.html and line.options.html.expanduser()
    if html:
        _check_writable(html)
    _preview(config, line.options.count, html)
    return 0


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a number of conversations, 0 or more")
    return int(text)


def _preview(config: Config, show: int, html: Path | None) -> None:
    silence_libraries()
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
    """Raise PreflightError now rather than after minutes of tokenizing."""
    if html.is_dir():
        raise PreflightError(f"--html {html} is a directory; name a file in it")
    if not html.absolute().parent.is_dir():
        raise PreflightError(f"--html {html}: there is no folder {html.absolute().parent}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without an error message
    sys.exit(main(sys.argv[1:]))
