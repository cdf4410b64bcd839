#!/usr/bin/env python3
"""Checks whether a run is ready: scripts/check_sft_ready.py [--json] [--measure] [FLAGS] [HYDRA OVERRIDES]"""

from in_environment import run_module

run_module("sft_recipe.cli.check")
