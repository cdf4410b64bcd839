#!/usr/bin/env python3
"""Draws the learning rate of each step: scripts/preview_schedule.py [--steps N] [--svg FILE] [FLAGS] [OVERRIDES]"""

from in_environment import run_module

run_module("sft_recipe.cli.preview_schedule")
