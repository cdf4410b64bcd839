#!/usr/bin/env python3
"""Exports a trained model: scripts/export_model.py RUN --out DIR [--merge] [--dtype bfloat16] [--format hf|gguf]"""

from in_environment import run_module

run_module("sft_recipe.cli.export")
