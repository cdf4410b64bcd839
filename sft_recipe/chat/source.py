"""Finds the model that an argument means: a run, a checkpoint, a folder with a model or an adapter, or a hub id."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft_recipe.config.schema import ModelConfig
from sft_recipe.data.rendering.options import RenderOptions
from sft_recipe.errors import ModelError
from sft_recipe.export.layout import MODEL
from sft_recipe.export.source import (
    ADAPTER_CONFIG,
    check_files,
    locate_checkpoint,
    model_of_run,
    named_base,
    resolve_named,
    run_config,
)
from sft_recipe.files import user_path
from sft_recipe.models.resolve import ResolvedModel


@dataclass(frozen=True)
class ModelSource:
    """Says where a model is, and the adapter over it, if any; `name` is as the user gave it.

    `settings` is the folder with tokenizer, chat template and generation config. `trained_from` finds the model that a
    run started from, None where it is unknown, and `base_name` is what the run called it; `options` are those of the
    run that change prompts.
    `checkpoint` is the folder `step_N` of a run, None for a model that is in none.
    """

    name: str
    model: ResolvedModel
    settings: Path
    adapter: Path | None = None
    trained_from: str | None = None
    base_name: str | None = None
    options: RenderOptions = RenderOptions()
    checkpoint: Path | None = None


def find_source(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Return the model that `name` means; a run means its checkpoint `best`, or its newest one.

    Raises CheckpointError for a run without a checkpoint and for weights that are not as they were saved, ModelError
    for a checkpoint without a model, an adapter without its base model, and for what `resolve_model` refuses. Only a
    hub id contacts a network.
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
    check_files(checkpoint, suffix=".safetensors")  # users may change the other files
    source = _source_of_model(name, folder, trust_remote_code)
    base_name = model_of_run(checkpoint) or source.trained_from
    trained_from = source.trained_from or base_name
    options = _options_of_run(checkpoint.parent.parent)
    return replace(source, trained_from=trained_from, base_name=base_name, options=options, checkpoint=checkpoint)


def model_config(name: str, trust_remote_code: bool) -> ModelConfig:
    """Return the configuration that names a model."""
    return ModelConfig.model_validate({"path": name, "fallback": None, "trust_remote_code": trust_remote_code})


def _source_of_model(name: str, folder: Path | None, trust_remote_code: bool) -> ModelSource:
    """`folder` is where the model is, None for one that only its name says."""
    if folder is None or not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        model = _resolve(str(folder) if folder else name, trust_remote_code)
        return ModelSource(name, model, model.folder)
    base = named_base(folder, "set base_model_name_or_path in it")
    try:
        model = _resolve(base, trust_remote_code)
    except ModelError as error:
        raise ModelError(
            f"the adapter {folder} needs its base model {base}: {str(error).rstrip('.')}. If the model has moved, set "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG}."
        ) from None
    return ModelSource(name, model, _settings_folder(folder, model.folder), folder, trained_from=base, base_name=base)


def _settings_folder(adapter: Path, base: Path) -> Path:
    """The adapter's own settings; those beside it, where a run has merged it as well; else those of its base model."""
    for folder in (adapter, adapter.parent / MODEL):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    return base


def _resolve(name: str, trust_remote_code: bool) -> ResolvedModel:
    return resolve_named(name, model_config(name, trust_remote_code))


def _options_of_run(run: Path) -> RenderOptions:
    """The options in a run's configuration that change prompts, the default for those that it does not have."""
    data = run_config(run).get("data")
    types: dict[str, type] = {"enable_thinking": bool, "chat_template_kwargs": dict, "fold_system": bool}
    found = data if isinstance(data, dict) else {}
    usable: dict[str, Any] = {key: value for key, value in found.items() if isinstance(value, types.get(key, ()))}
    return RenderOptions(**usable)
