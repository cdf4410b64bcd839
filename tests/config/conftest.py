"""Fixtures for the tests of the configuration."""

import pytest
import yaml

from sft_recipe.config import compose
from sft_recipe.config.compose import HOME, load_config
from tests.support.composing import DEFAULTS, compose_cached


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """Keep relative data paths unchanged; let Hydra read the recipe's own files once for each set of choices."""
    monkeypatch.chdir(HOME)
    monkeypatch.setattr(compose, "_compose", compose_cached)


@pytest.fixture
def compose_own(tmp_path):
    """Return a function that composes a config.yaml in a temporary folder without conf/."""

    def load(body, *overrides, defaults=DEFAULTS, folder=tmp_path):
        (folder / "config.yaml").write_text(defaults + (body if isinstance(body, str) else yaml.safe_dump(body)))
        return load_config(list(overrides), folder)

    return load
