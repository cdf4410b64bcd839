"""Fixtures of the tests that resolve models."""

from pathlib import Path

import huggingface_hub
import pytest

from sft_recipe.models import gguf as gguf_module


@pytest.fixture
def cache_dir(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache; the hub itself is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Replace the conversion by one that writes only an empty config; returns the list of converted files."""
    converted: list[Path] = []

    def write(source: Path, target: Path) -> None:
        converted.append(source)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_module, "_write_converted", write)
    return converted
