"""scripts/preview_data.py: shows the training data that train.sh's flags, variables and overrides select.

Until the configuration is composed it uses only the standard library, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import FLAGS, CommandLine, Flag, Parser, add_language, parse
from sft_recipe.errors import PreflightError, run_command, silence_libraries
from sft_recipe.files import user_path
from sft_recipe.language import set_language

if TYPE_CHECKING:
    from sft_recipe.config.schema import Config

SHOWN = 5
USAGE = "scripts/preview_data.py [-n 5] [--find TEXT] [--sort ORDER] [--step N] [--html FILE] [FLAGS] [HYDRA OVERRIDES]"
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
    parser.add_argument("--find", default="", metavar="TEXT", help="show conversations that contain this text")
    parser.add_argument(
        "--sort",
        default="",
        choices=["longest", "shortest", "least_supervised"],
        help="show the longest ones, the shortest, or those with the fewest supervised tokens",
    )
    parser.add_argument(
        "--step", type=_step, metavar="NUMBER", help="also show how the examples of this optimizer step are packed"
    )
    parser.add_argument(
        "--quality",
        action="store_true",
        help="also count near-duplicates, validation records like training ones, answers that break off or repeat",
    )
    parser.add_argument(
        "--benchmarks",
        type=Path,
        metavar="FILE",
        help="as --quality, and look for these questions, one a line or a record",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a self-contained HTML page")
    add_language(parser)
    return parser


def shown_flags() -> list[Flag]:
    """Return the flags of train.sh that change the preview, for --help."""
    return [flag for flag in FLAGS if flag.key.startswith(("model.", "data.")) and flag.name != "val_data"]


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: _run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> CommandLine:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    return parse(args, os.environ, preview_parser(), shown_flags())


def _run(line: CommandLine) -> int:
    from sft_recipe.config.compose import load_config, parse_config_args

    set_language(line.options.lang)
    config = load_config(line.overrides, **parse_config_args(line.config_args))
    html = line.options.html and user_path(line.options.html)
    if html:
        _check_writable(html)
    _preview(config, line.options, html)
    return 0


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a number of conversations, 0 or more")
    return int(text)


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not the number of a step, 1 or more")
    return int(text)


def _preview(config: Config, options: argparse.Namespace, html: Path | None) -> None:
    silence_libraries()
    from rich.console import Console

    from sft_recipe.data.preview.compute import compute_preview
    from sft_recipe.data.preview.selection import Selection
    from sft_recipe.data.preview.step import step_lines
    from sft_recipe.data.preview.terminal import print_preview
    from sft_recipe.data.quality import QualityChecks, read_questions
    from sft_recipe.files import write_text

    selection = Selection(options.find, options.sort)
    questions = read_questions(user_path(options.benchmarks)) if options.benchmarks else []
    checks = QualityChecks(questions) if options.quality or questions else None
    preview = compute_preview(config, options.count, lambda notice: print(notice, file=sys.stderr), selection, checks)
    lines = list(step_lines(preview.stats, options.step)) if options.step else []
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for a terminal that cannot print ⏎
    print_preview(preview.stats, preview.renderer, Console(highlight=False))
    print("\n".join(lines), end="\n" if lines else "")
    if html:
        page = preview.html
        try:
            write_text(html, page)
        except OSError as error:
            raise PreflightError(f"{html} cannot be written: {error.strerror}") from None
        print(f"page: {html}")


def _check_writable(html: Path) -> None:
    """Raise PreflightError now rather than after minutes of tokenizing."""
    if html.is_dir():
        raise PreflightError(f"--html {html} is a directory; name a file in it")
    if not html.absolute().parent.is_dir():
        raise PreflightError(f"--html {html}: there is no folder {html.absolute().parent}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without an error message
    sys.exit(main(sys.argv[1:]))
