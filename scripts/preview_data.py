#!/usr/bin/env python3
"""Shows the data as training uses it: scripts/preview_data.py [-n 5] [--html FILE] [FLAGS] [HYDRA OVERRIDES]"""

from in_environment import run_module

run_module("sft_recipe.cli.preview")
