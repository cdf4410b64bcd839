"""Fixtures for the tests of chat: models with a chosen answer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from sft_recipe.chat.model import ChatModel
from sft_recipe.chat.source import find_source
from tests.chat.scripted import build_adapter, build_scripted_model

ANSWER = "Paris, the capital of France."
ADAPTED = " the capital of France."


def load(folder: Path, **changes) -> ChatModel:
    """Load a model on the CPU; `changes` replace fields of its source."""
    return ChatModel(replace(find_source(str(folder)), **changes), torch.device("cpu"))


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars():
    """The programs switch them off before transformers is imported, which it is here."""
    disable_progress_bar()


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    """A model folder whose model always answers ANSWER."""
    return build_scripted_model(tmp_path_factory.mktemp("scripted") / "model", ANSWER)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, scripted):
    """An adapter with which the same model answers ADAPTED."""
    return build_adapter(tmp_path_factory.mktemp("scripted") / "adapter", scripted, "Pa", " the")


@pytest.fixture
def model(scripted):
    return load(scripted)
