"""Runs a module in the environment that train.sh would use or install."""

import os
import sys
from pathlib import Path
from typing import NoReturn

HOME = str(Path(__file__).resolve().parent.parent)
START = '. "$0/scripts/environment.sh"; choose_environment; exec "$PYTHON" -m "$@"'


def run_module(name: str, help_needs_environment: bool = True) -> NoReturn:
    """Replace this process by `python -m name` with the same arguments."""
    if not help_needs_environment and {"-h", "--help"} & set(sys.argv[1:]):
        os.environ["PYTHONPATH"] = HOME
        os.execv(sys.executable, [sys.executable, "-m", name, "--help"])
    if sys.prefix != sys.base_prefix:
        os.environ["VIRTUAL_ENV"] = sys.prefix  # the environment of this Python comes first
    os.execvp("bash", ["bash", "-euo", "pipefail", "-c", START, HOME, name, *sys.argv[1:]])
