"""Helpers of the tests that resolve models: a fake hub, and a short way to resolve."""

import shutil
from pathlib import Path

import huggingface_hub

from sft_recipe.config.schema import ModelConfig
from sft_recipe.models.resolve import ResolvedModel, resolve_model

HUB_NAME = "a-lab/a-model"


def cached_model(hub_cache: Path, model_dir: Path, name: str = HUB_NAME, leave_out: str = "") -> Path:
    """Put a model into the hub cache as a download does."""
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd" * 5)
    return shutil.copytree(
        model_dir, repository / "snapshots" / ("0123abcd" * 5), ignore=shutil.ignore_patterns(leave_out)
    )


def find(path: str | Path, cache_dir: Path, **settings) -> ResolvedModel:
    return resolve_model(ModelConfig(**({"path": str(path), "fallback": None} | settings)), cache_dir)


def downloads(folder: Path, monkeypatch):
    """Replace the hub; return a function that says whether a file would have been downloaded."""
    asked: dict[str, list[str]] = {}

    def download(name, *, allow_patterns, ignore_patterns, **_):
        asked.update(allow=allow_patterns, ignore=ignore_patterns)
        return str(folder)

    def is_downloaded(file: str) -> bool:
        allowed = huggingface_hub.utils.filter_repo_objects(
            [file], allow_patterns=asked["allow"], ignore_patterns=asked["ignore"]
        )
        return list(allowed) == [file]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return is_downloaded
