#!/usr/bin/env python3
"""Converts data of any format to train and validation Parquet: scripts/prepare_sft_data.py --in X... --out DIR"""

from in_environment import run_module

run_module("sft_recipe.cli.prepare")
