#!/usr/bin/env python3
"""The program of scripts/chat.py under the name that other projects give it."""

from in_environment import run_module

run_module("sft_recipe.cli.chat")
