"""Fixtures for the tests of the commands."""

import pytest

from sft_recipe.cli.flags import FLAGS
from sft_recipe.config import compose
from sft_recipe.config.compose import HOME
from tests.support.composing import compose_cached


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Unset the variables of all flags and SFT_DEBUG; let Hydra read the recipe's own files once."""
    for flag in FLAGS:
        for name in flag.names:
            monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("SFT_DEBUG", raising=False)
    monkeypatch.chdir(HOME)
    monkeypatch.setattr(compose, "_compose", compose_cached)
