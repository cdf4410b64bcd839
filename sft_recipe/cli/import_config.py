"""scripts/import_config.py: the configuration of another project as a command line of train.sh.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from sft_recipe.cli.flags import Parser, quote
from sft_recipe.errors import ConfigError, run_command
from sft_recipe.files import user_path


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    parser = Parser(
        "scripts/import_config.py FILE [--gpus N]",
        """\
Reads a YAML of LLaMA-Factory (with its dataset_info.json), axolotl, TRL or verl, or a shell script that starts
SFT with TRL or verl, and prints the same run as a command line of train.sh. What could not be mapped is listed
below it, each with the reason; what the file leaves out has the default of its project.""",
    )
    parser.add_argument("file", metavar="FILE", help="the configuration of another project")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of each machine (default: those of FILE, or 1)")
    options = parser.parse_args(args)
    if not options.file:
        raise ConfigError("FILE is empty; it must be the name of a file")
    if options.gpus is not None and options.gpus < 1:
        raise ConfigError(f"--gpus is {options.gpus}; it must be a number of GPUs, 1 or more")
    return options


def run(options: argparse.Namespace) -> int:
    """Print the command line and return 0. Raises ConfigError for a file that cannot be imported."""
    from sft_recipe.config.importing.source import import_config

    name, imported = import_config(user_path(options.file), options.gpus)
    words = [shlex.quote(f"{key}={_value(value)}") for key, value in sorted(imported.values.items())]
    print(f"# {options.file}, of {name}")
    print(" \\\n    ".join(["./train.sh", *words]))
    if imported.unmapped:
        print("\n# Not mapped:")
    for line in imported.unmapped:
        print(f"#   {' '.join(line.split())}")
    return 0


def _value(value: Any, in_list: bool = False) -> str:
    """A value as Hydra reads it back."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(item, in_list=True) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_value(item, in_list=True)}' for key, item in value.items())}}}"
    return quote(value, in_list) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
