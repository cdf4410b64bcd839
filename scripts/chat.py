#!/usr/bin/env python3
"""Talks to a trained model: scripts/chat.py RUN [--prompts FILE] [--compare [BASE]] [FLAGS]"""

from in_environment import run_module

run_module("sft_recipe.cli.chat")
