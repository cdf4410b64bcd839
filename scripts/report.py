#!/usr/bin/env python3
"""Writes the report of a run, or compares several: scripts/report.py RUN [RUN ...] [--out FILE] [--json] [--lang zh]"""

from in_environment import run_module

run_module("sft_recipe.cli.report")
