"""Finds the model that an argument means: a run, a checkpoint, a folder with a model or an adapter, or a hub id."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_recipe.checkpoint.manifest import read_manifest
from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError
from sft_recipe.export.layout import MODEL
from sft_recipe.export.source import ADAPTER_CONFIG, locate_checkpoint, resolve_named, run_config
from sft_recipe.files import user_path
from sft_recipe.models.resolve import ResolvedModel


@dataclass(frozen=True)
class ModelSource:
    """Says where a model is, and the adapter over it, if any; `name` is as the user gave it.

    `settings` is the folder with tokenizer, chat template and generation config. `trained_from` is the name of the
    model that a run started from, None where it is unknown; `enable_thinking` is the run's `data.enable_thinking`.
    """

    name: str
    model: ResolvedModel
    settings: Path
    adapter: Path | None = None
    trained_from: str | None = None
    enable_thinking: bool | None = None


def find_source(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Return the model that `name` means; a run means its checkpoint `best`, or its newest one.

    Raises CheckpointError for a run without a checkpoint, ModelError for a checkpoint without a model, an adapter
    without its base model, and for what `resolve_model` refuses. Only a hub id contacts a network.
    """
    path = user_path(name)
    if not path.is_dir():
        return _source_of_model(name, None, trust_remote_code)
    checkpoint = locate_checkpoint(path)
    if checkpoint is None:
        return _source_of_model(name, path, trust_remote_code)
    folder = path if (path / ADAPTER_CONFIG).is_file() else checkpoint / MODEL
    if not folder.is_dir():
        raise ModelError(
            f"{checkpoint} has no exported model ({MODEL}/); --resume_from auto continues its run and exports it"
        )
    source = _source_of_model(name, folder, trust_remote_code)
    trained_from = source.trained_from or _model_of_run(checkpoint)
    return replace(source, trained_from=trained_from, enable_thinking=_thinking_of_run(checkpoint.parents[1]))


def model_config(name: str, trust_remote_code: bool) -> ModelConfig:
    """Return the configuration that names a model."""
    return ModelConfig.model_validate({"path": name, "fallback": None, "trust_remote_code": trust_remote_code})


def _source_of_model(name: str, folder: Path | None, trust_remote_code: bool) -> ModelSource:
    """`folder` is where the model is, None for one that only its name says."""
    if folder is None or not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        model = _resolve(str(folder) if folder else name, trust_remote_code)
        return ModelSource(name, model, model.folder)
    base = _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / ADAPTER_CONFIG} names no base model: set base_model_name_or_path in it")
    try:
        model = _resolve(base, trust_remote_code)
    except ModelError as error:
        raise ModelError(
            f"the adapter {folder} needs its base model {base}: {str(error).rstrip('.')}. If the model has moved, set "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG}."
        ) from None
    return ModelSource(name, model, _settings_folder(folder, model.folder), folder, trained_from=base)


def _settings_folder(adapter: Path, base: Path) -> Path:
    """The adapter's own settings; those beside it, where a run has merged it as well; else those of its base model."""
    for folder in (adapter, adapter.parent / MODEL):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    return base


def _resolve(name: str, trust_remote_code: bool) -> ResolvedModel:
    return resolve_named(name, model_config(name, trust_remote_code))


def _model_of_run(checkpoint: Path) -> str | None:
    """The name of the model that a run started from, None where the manifest does not have it."""
    try:
        return read_manifest(checkpoint)["identity"]["model"].rpartition(" (")[0] or None
    except (ValueError, KeyError):
        return None


def _thinking_of_run(run: Path) -> bool | None:
    """The value of data.enable_thinking in a run's configuration, None where it has none."""
    data = run_config(run).get("data")
    thinking = data.get("enable_thinking") if isinstance(data, dict) else None
    return thinking if isinstance(thinking, bool) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} cannot be read: it is no JSON object")
    return content
