"""Runs a module of sft_recipe.cli in the environment that train.sh would use or install.

As a script, with a module and its arguments, it checks the arguments; that needs only the standard library.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

HOME = str(Path(__file__).resolve().parent.parent)
START = '. "$0/scripts/environment.sh"; choose_environment "" "$@"; exec "$PYTHON" -m "$@"'


def run_module(name: str) -> NoReturn:
    """Replace this process by `python -m name` with the same arguments; --help needs no environment."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(check_arguments(name, ["--help"]))
    if sys.prefix != sys.base_prefix:
        os.environ["VIRTUAL_ENV"] = sys.prefix  # the environment of this Python comes first
    os.execvp("bash", ["bash", "-euo", "pipefail", "-c", START, HOME, name, *sys.argv[1:]])


def check_arguments(name: str, args: list) -> int:
    """Return 2 after a message if a module would refuse its arguments, else 0; --help prints the help and exits."""
    sys.path.insert(0, HOME)
    from sft_recipe.errors import run_command

    return run_command(lambda: import_module(name).parse_arguments(args) and 0)


if __name__ == "__main__":
    sys.exit(check_arguments(sys.argv[1], sys.argv[2:]))
