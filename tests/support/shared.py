"""Reference data that lies beside a checkout, in shared/data; tests that need it are skipped where it is absent."""

from pathlib import Path

import pytest

from tests.support.runs import ROOT

DATA = next((path for parent in ROOT.parents if (path := parent / "shared/data").is_dir()), Path("shared/data"))


def shared_data(name: str) -> Path:
    """Return a folder of the reference data; skips the test where it is absent."""
    if not (DATA / name).is_dir():
        pytest.skip(f"there is no shared/data/{name} beside this checkout")
    return DATA / name
