#!/usr/bin/env python3
"""Data of any format -> train and validation Parquet: scripts/prepare_sft_data.py --in X... --out DIR"""

from in_environment import run_module

run_module("sft_recipe.cli.prepare")
