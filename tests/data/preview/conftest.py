"""Fixtures of the tests of the preview."""

import pytest

from sft_recipe.data.rendering.renderer import Renderer


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)
