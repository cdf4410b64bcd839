"""scripts/report.py: the report of a run as an HTML page, or a page that compares several.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import Parser, add_language
from sft_recipe.errors import ConfigError, PreflightError, run_command
from sft_recipe.files import user_path
from sft_recipe.language import chosen_language, fill

if TYPE_CHECKING:
    from sft_recipe.report.run import Run

COMPARISON = "comparison.html"
MOST_RUNS = 8  # that can be distinguished in one chart
USAGE = "scripts/report.py RUN [RUN ...] [--out FILE] [--json] [--lang en|zh]"
DESCRIPTION = """\
Reads run folders, finished ones or ones that still train. One run: writes report.html and loss.png into its folder.
Several: writes comparison.html, with their curves over each other and what differs; so for the folder of a sweep, into
its report.html. Prints the essential numbers."""


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    options = _parser().parse_args(args)
    options.lang = chosen_language(options.lang)
    folders = [user_path(name).resolve() for name in options.runs]
    if repeated := next((name for name in options.runs if folders.count(user_path(name).resolve()) > 1), None):
        raise ConfigError(f"{repeated} is named twice; a comparison needs different runs")
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs are named; a page compares up to {MOST_RUNS}")
    if options.out == "":
        raise ConfigError("--out needs a value")
    return options


def _parser() -> Parser:
    parser = Parser(USAGE, DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, the trainer.output_dir of a run or sweep")
    parser.add_argument(
        "--out", metavar="FILE", help=f"the page (default: RUN/report.html; of several runs: {COMPARISON} here)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON; a page only with --out")
    add_language(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Write the page, print the numbers, and return 0. Raises CheckpointError for a folder that is no run."""
    from sft_recipe.launch.sweep import REPORT, run_folders
    from sft_recipe.report.compare import as_json
    from sft_recipe.report.run import read_run
    from sft_recipe.report.words import report_translator

    if sweep := run_folders(user_path(options.runs[0])) if len(options.runs) == 1 else []:
        options.out = options.out or (None if options.json else str(user_path(options.runs[0]) / REPORT))
        options.runs = list(map(str, sweep))
    runs = [read_run(name) for name in options.runs]
    path = _target(options, runs)
    if path:
        _write(runs, path, options.lang)
    if options.json:
        print(json.dumps(as_json(runs, options.lang), ensure_ascii=False, indent=2))
    else:
        _print(runs, options.lang)
        print(fill(report_translator(options.lang)("page: {path}"), path=path))
    return 0


def _target(options: argparse.Namespace, runs: list[Run]) -> Path | None:
    """The file of the page, None where none is wanted. Raises PreflightError where it cannot be a file."""
    if options.out is None:
        default = runs[0].folder / "report.html" if len(runs) == 1 else Path(COMPARISON)
        return None if options.json else default
    path = user_path(options.out)
    if path.is_dir():
        raise PreflightError(f"--out {path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise PreflightError(f"--out {path}: there is no folder {path.absolute().parent}")
    return path


def _write(runs: list[Run], path: Path, language: str) -> None:
    from sft_recipe.files import write_text
    from sft_recipe.report.compare import comparison_page
    from sft_recipe.report.writer import write_report

    try:
        if len(runs) == 1:
            write_report(runs[0], path, language)
        else:
            write_text(path, comparison_page(runs, language))
    except OSError as error:
        raise PreflightError(f"{path} cannot be written: {error.strerror or error}") from None


def _print(runs: list[Run], language: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sft_recipe.display import printable
    from sft_recipe.report.compare import names, remark, results
    from sft_recipe.report.findings import find_problems
    from sft_recipe.report.words import describe

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in names(runs):
        table.add_column(Text(printable(name)), justify="right")
    for row in results(runs, language):
        cells = [Text(text, style="bold" if text and row.best == place else "") for place, text in enumerate(row.texts)]
        table.add_row(row.name, *cells)
    console.print(table)
    if text := remark(runs, language):
        console.print(text, soft_wrap=True, markup=False)
    for name, one in zip(names(runs), runs, strict=True):
        for finding in find_problems(one):
            before = f"{printable(name)}: " if len(runs) > 1 else ""
            console.print(f"{before}{describe(finding, language)['text']}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
