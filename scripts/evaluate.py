#!/usr/bin/env python3
"""Runs benchmarks of lm-evaluation-harness: scripts/evaluate.py RUN --tasks NAME[,NAME...] [FLAGS]"""

from in_environment import run_module

run_module("sft_recipe.cli.evaluate")
