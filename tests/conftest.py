"""Fixtures shared by all tests; nothing here touches a network."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support import tiny
from tests.support.warm import Warm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import, as all commands do: silence_libraries

settings.register_profile("untimed", deadline=None)  # a test that is slow beside other programs has not failed
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def environment():
    """A test's changes of the environment, and those of the code it calls, end with it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tokenizer():
    """A ChatML tokenizer; do not change it in a test."""
    return tiny.build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A two-layer Llama with its tokenizer, as a Hugging Face folder; read-only."""
    return tiny.build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def warm():
    """A process that has imported everything and starts runs by forking."""
    with Warm() as process:
        yield process


# Test files that take longest, longest first: two workers that begin with them finish together.
LONGEST_FILES = [
    "test_smollm2",
    "test_chaos",
    "test_local",
    "test_signals",
    "test_elastic",
    "test_sft_engine",
    "test_resolve",
    "test_trainer",
    "test_manager",
    "test_resume",
]


def pytest_collection_modifyitems(items):
    """Order the test files by how long they take."""
    order = {name: position for position, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
