#!/usr/bin/env python3
"""Serves a trained model through an OpenAI-compatible API: scripts/serve.py RUN [--port 8000] [FLAGS]"""

from in_environment import run_module

run_module("sft_recipe.cli.serve")
