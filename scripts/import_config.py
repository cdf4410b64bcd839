#!/usr/bin/env python3
"""Prints another project's configuration as a command line of train.sh: scripts/import_config.py FILE [--gpus N]"""

from in_environment import run_module

run_module("sft_recipe.cli.import_config")
