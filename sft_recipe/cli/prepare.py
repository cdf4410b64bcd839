"""scripts/prepare_sft_data.py: converts data of any format to train and validation Parquet, without duplicates.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import Parser
from sft_recipe.data.formats import FORMATS
from sft_recipe.errors import ConfigError, run_command
from sft_recipe.files import user_path

if TYPE_CHECKING:
    from sft_recipe.data.parquet_writer import ScanResult


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    options = _parser().parse_args(args)
    if not 0 <= options.val_ratio < 1:
        raise ConfigError(f"--val_ratio is {options.val_ratio:g}; it must be a fraction, at least 0 and less than 1")
    if options.small is not None and options.small < 1:
        raise ConfigError(f"--small is {options.small}; it must be a number of examples, 1 or more")
    if options.seed < 0:
        raise ConfigError(f"--seed is {options.seed}; it must be 0 or more")
    if not options.out:
        raise ConfigError("--out needs a value")
    options.columns = dict(_column(text) for text in options.columns)
    return options


def _parser() -> Parser:
    parser = Parser(
        "scripts/prepare_sft_data.py --in X [X ...] --out DIR [FLAGS]",
        """\
Reads data of any format and writes train.parquet and validation.parquet: prompt and response if all
conversations are one question and one answer, else messages. Exact duplicates and empty records are
dropped and counted.""",
    )
    parser.add_argument(
        "--in",
        dest="files",
        action="extend",
        nargs="+",
        required=True,
        metavar="X",
        help="files, globs, hub data sets",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--val_ratio", type=float, default=0.05, help="fraction held out (default: 0.05; 0: none)")
    parser.add_argument("--small", type=int, metavar="N", help="also write train_small.parquet with N examples")
    parser.add_argument("--seed", type=int, default=42, help="seed of the split and of --small (default: 42)")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="default: auto")
    parser.add_argument(
        "--columns",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="your column names: response=answer",
    )
    parser.add_argument("--on_bad_record", default="error", choices=["error", "skip"], help="default: error")
    return parser


def run(options: argparse.Namespace) -> int:
    """Prepare the data and return 0. Raises DataError for invalid data, ConfigError for options that do not fit it."""
    from sft_recipe.data.columns import Columns
    from sft_recipe.data.parquet_writer import ParquetOptions, write_parquet
    from sft_recipe.data.sources import resolve_files

    sources = resolve_files(options.files, user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sft_recipe")
    if shared := [source.name for source in sources if source.weight != 1 or source.count is not None]:
        raise ConfigError(
            f"{shared[0]} has a weight or count, which applies to training only; here name the file alone"
        )
    files = [file for source in sources for file in source.files]
    parquet = ParquetOptions(options.val_ratio, options.small, options.seed, options.format, options.on_bad_record)
    _print_summary(*write_parquet(files, user_path(options.out), Columns(options.columns), parquet))
    return 0


def _column(text: str) -> tuple[str, str]:
    ours, is_pair, theirs = text.partition("=")
    if not is_pair:
        raise ConfigError(f"--columns {text}: expected NAME=COLUMN, as in response=answer")
    return ours, theirs


def _print_summary(scan: ScanResult, written: dict[Path, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row(f"{len(scan.is_used):,}", "records read")
    for what, count in sorted(scan.dropped.items()):
        if count:
            table.add_row(f"{count:,}", f"dropped: {what}")
    for path, count in written.items():
        table.add_row(f"{count:,}", str(path))
    console = Console(highlight=False)
    console.print(table)
    for sentence in scan.remarks.sentences():
        console.print(sentence, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
