"""scripts/prepare_sft_data.py: converts data of any format to train and validation Parquet, without duplicates.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import Parser
from sft_recipe.data.formats import FORMATS
from sft_recipe.data.messages import ROLES
from sft_recipe.data.turns import role_of
from sft_recipe.errors import ConfigError, run_command
from sft_recipe.files import user_path

DROPPED_KINDS = ("near_duplicates", "contaminated", "truncated", "repeated")  # as in data/quality.py

if TYPE_CHECKING:
    from sft_recipe.data.parquet_writer import ScanResult


EXAMPLE = Path(__file__).resolve().parents[2] / "data/example_sft.json"


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
    options.columns = dict(_pair("--columns", text, "NAME=COLUMN, as in response=answer") for text in options.columns)
    options.roles = dict(_pair("--roles", text, "NAME=ROLE, as in Agent=assistant") for text in options.roles)
    options.drop = tuple(kind for kind in options.drop.replace(" ", "").split(",") if kind)
    if unknown := next((kind for kind in options.drop if kind not in DROPPED_KINDS), None):
        raise ConfigError(f"--drop: {unknown!r} is none of {', '.join(DROPPED_KINDS)}")
    if ("contaminated" in options.drop) != bool(options.benchmarks):
        raise ConfigError("--drop contaminated and --benchmarks FILE belong together: give both")
    if wrong := next((role for role in options.roles.values() if role_of(role) not in ROLES), None):
        raise ConfigError(f"--roles: {wrong!r} is not a role; expected {', '.join(ROLES)}, or function_call")
    return options


def _parser() -> Parser:
    parser = Parser(
        "scripts/prepare_sft_data.py [--in X [X ...]] [--out DIR] [FLAGS]",
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
        metavar="X",
        help="files, globs, hub data sets (default: the example data)",
    )
    parser.add_argument("--out", default="prepared", metavar="DIR", help="folder to write to (default: prepared)")
    parser.add_argument("--val_ratio", type=float, default=0.05, help="fraction held out (default: 0.05; 0: none)")
    parser.add_argument("--small", type=int, metavar="N", help="also write train_small.parquet with N examples")
    parser.add_argument("--seed", type=int, default=42, help="seed of the split and of --small (default: 42)")
    formats = [name for name in FORMATS if name != "tokens"]
    parser.add_argument("--format", default="auto", choices=["auto", *formats], help="default: auto")
    parser.add_argument(
        "--columns",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help="your column names: response=answer",
    )
    parser.add_argument(
        "--roles",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=ROLE",
        help="your names of roles: Agent=assistant; common names are known",
    )
    parser.add_argument(
        "--drop",
        default="",
        metavar="KIND,...",
        help=f"also leave out {', '.join(DROPPED_KINDS)} records; dropped.jsonl says why",
    )
    parser.add_argument(
        "--benchmarks", metavar="FILE", help="questions, one a line or a record; records with them are contaminated"
    )
    parser.add_argument("--on_bad_record", default="error", choices=["error", "skip"], help="default: error")
    return parser


def run(options: argparse.Namespace) -> int:
    """Prepare the data and return 0. Raises DataError for invalid data, ConfigError for options that do not fit it."""
    from sft_recipe.data.columns import Columns
    from sft_recipe.data.parquet_writer import ParquetOptions, write_parquet
    from sft_recipe.data.quality import read_questions
    from sft_recipe.data.sources import resolve_files

    names = options.files or [str(EXAMPLE)]
    sources = resolve_files(names, user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sft_recipe")
    if shared := [source.name for source in sources if source.weight != 1 or source.count is not None]:
        raise ConfigError(
            f"{shared[0]} has a weight or count, which applies to training only; here name the file alone"
        )
    files = [file for source in sources for file in source.files]
    questions = tuple(read_questions(user_path(options.benchmarks))) if options.benchmarks else ()
    parquet = ParquetOptions(
        options.val_ratio,
        options.small,
        options.seed,
        options.format,
        options.on_bad_record,
        options.drop,
        questions,
    )
    scan, written = write_parquet(files, user_path(options.out), Columns(options.columns, options.roles), parquet)
    _print_summary(scan, written)
    print(_train_command(written))
    return 0


def _pair(flag: str, text: str, form: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not is_pair:
        raise ConfigError(f"{flag} {text}: expected {form}")
    return name, value


def _train_command(written: dict[Path, int]) -> str:
    """Return the command that trains on the files."""
    flags = {"train": "--train_data", "validation": "--val_data"}
    words = [word for path in written if path.stem in flags for word in (flags[path.stem], str(path))]
    return f"train on it: {shlex.join(['./train.sh', *words])}"


def _print_summary(scan: ScanResult, written: dict[Path, int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row(f"{len(scan.is_used):,}", "records read")
    for what, count in sorted(scan.dropped.items()):
        if count:
            table.add_row(f"{count:,}", f"dropped: {what}")
    for path, count in written.items():
        table.add_row(f"{count:,}", Text(str(path)))
    console = Console(highlight=False)
    console.print(table)
    for sentence in scan.remarks.sentences():
        console.print(sentence, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
