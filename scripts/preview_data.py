#!/usr/bin/env python3
"""Shows what training will see of the data: scripts/preview_data.py [-n 5] [--html FILE] [FLAGS] [HYDRA OVERRIDES]"""

# The environment is found, or made, by the lines that do it for train.sh; --help needs none.

import os
import sys
from pathlib import Path

home = str(Path(__file__).resolve().parent.parent)
if {"-h", "--help"} & set(sys.argv[1:]):
    os.environ["PYTHONPATH"] = home
    os.execv(sys.executable, [sys.executable, "-m", "sft_recipe.preview_data", "--help"])
if sys.prefix != sys.base_prefix:
    os.environ["VIRTUAL_ENV"] = sys.prefix  # an environment whose own Python was named comes first
start = '. "$0/scripts/environment.sh"; choose_environment; exec "$PYTHON" -m sft_recipe.preview_data "$@"'
os.execvp("bash", ["bash", "-euo", "pipefail", "-c", start, home, *sys.argv[1:]])
