"""One warm process for all tests of this folder."""

import pytest

from tests.warm import Warm


@pytest.fixture(scope="session")
def warm():
    with Warm() as process:
        yield process
