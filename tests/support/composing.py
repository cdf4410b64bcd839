"""Composing configurations in tests: Hydra reads the recipe's own files once."""

import copy

import pytest

from sft_recipe.config import compose
from sft_recipe.config.compose import GROUPS, HOME, load_config
from sft_recipe.errors import ConfigError

DEFAULTS = "defaults:\n" + "".join(f"  - {group}: default\n" for group in GROUPS) + "  - _self_\n"
DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B"
FALLBACK = "SmolLM2-135M-Instruct"
COMPOSE, CACHE = compose._compose, {}  # type: ignore[var-annotated]


def compose_cached(root, written, choices, config_dir):
    if root.parent != HOME:
        return COMPOSE(root, written, choices, config_dir)
    key = tuple(item.input_line for item in choices)
    if key not in CACHE:
        CACHE[key] = COMPOSE(root, written, choices, config_dir)
    return copy.deepcopy(CACHE[key])


def error_of(*args):
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    return str(caught.value)
