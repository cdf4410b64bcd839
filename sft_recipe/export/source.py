"""Finds what is exported: the model of a run, of a checkpoint or of a folder, or an adapter and its base model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft_recipe.checkpoint.manager import list_checkpoints
from sft_recipe.checkpoint.manifest import BEST, MANIFEST, compare, read_manifest
from sft_recipe.config.run_config import read_run_config
from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import CheckpointError, ConfigError, ModelError
from sft_recipe.export.layout import ADAPTER, MODEL
from sft_recipe.files import user_path
from sft_recipe.models.minimind_lora import convert_lora
from sft_recipe.models.resolve import ResolvedModel, resolve_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """A Source is a trained model on this machine: a complete one, or an adapter and its base model.

    `base` is the complete model, or the adapter's base. `tokenizer` is the folder with the trained tokenizer and its
    generation config. `checkpoint` is None for a model that no checkpoint of ours holds. `settings` are those of its
    run, or the defaults.
    """

    name: str
    base: ResolvedModel
    adapter: Path | None
    tokenizer: Path
    checkpoint: Path | None
    settings: ModelConfig

    @property
    def run(self) -> Path | None:
        """The run folder, or None."""
        return self.checkpoint.parent.parent if self.checkpoint else None


def find_source(run: str | None, step: int | None, adapter: str | None, base: str | None) -> Source:
    """Return what the command line names: a run, a checkpoint or a model folder `run`, or the folder `adapter`.

    `base` is the adapter's base model where its configuration does not name it. Raises ConfigError for a combination
    that means nothing, CheckpointError for a run or checkpoint without a complete model, ModelError for a folder that
    holds none and for a base model that is not on this machine.
    """
    if (run is None) == (adapter is None):
        raise ConfigError("name what to export: a run, checkpoint or model folder, or --adapter DIR; one of them")
    folder = user_path(run or adapter or "")
    if adapter and folder.is_file() and folder.suffix == ".pth":
        folder = convert_lora(folder, _cache_dir())
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder.absolute()}; name a run folder, a checkpoint or a model folder")
    checkpoint = None if adapter else locate_checkpoint(folder, step)
    if step is not None and checkpoint is None:
        raise ConfigError(f"--step {step} needs a run folder; {folder} is none")
    settings = _settings(checkpoint)
    if checkpoint:
        check_files(checkpoint)
        model, adapters = checkpoint / MODEL, checkpoint / ADAPTER
        found = adapters if adapters.is_dir() else model if _is_adapter(model) else None
        return _with_base(str(folder), found, model, base, checkpoint, settings)
    is_adapter = _is_adapter(folder) and not (folder / "config.json").is_file()
    if adapter and not is_adapter:
        raise ModelError(f"--adapter {folder} has no {ADAPTER_CONFIG}, or it holds a complete model as well")
    if not is_adapter and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is no run folder (checkpoints/step_N), no checkpoint ({MANIFEST}) and no model (config.json or "
            f"{ADAPTER_CONFIG})"
        )
    return _with_base(str(folder), folder if is_adapter else None, folder, base, None, settings)


def _with_base(
    name: str, adapter: Path | None, model: Path, base: str | None, checkpoint: Path | None, settings: ModelConfig
) -> Source:
    if adapter is None:
        if base:
            raise ConfigError(f"--model names the base of an adapter; {name} is a complete model")
        return Source(name, resolve_named(str(model), settings), None, model, checkpoint, settings)
    if not base:
        base = named_base(adapter, "name it with --model")
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise ModelError(f"the adapter's base model {base} is not on this machine: name it with --model")
    resolved = resolve_named(base, settings)
    has_tokenizer = (model / "tokenizer_config.json").is_file()
    return Source(name, resolved, adapter, model if has_tokenizer else resolved.folder, checkpoint, settings)


def resolve_named(path: str, settings: ModelConfig) -> ResolvedModel:
    """Return the model at `path`, with no fallback, read with these settings. Raises ModelError."""
    config = settings.model_copy(update={"path": path, "fallback": None})
    return resolve_model(config, _cache_dir())


def _cache_dir() -> Path:
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sft_recipe"


def named_base(adapter: Path, remedy: str) -> str:
    """Return the base model that an adapter's configuration names.

    Raises ModelError where it cannot be read, and where it names none; `remedy` says what to do then.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path} names no base model: {remedy}")
    return name


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def locate_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """Return the checkpoint that `folder` is, or that holds it, or the one of the run folder; None for another folder.

    That of a run is `step_N`, or `best` if there is one, or the newest. Raises CheckpointError for a run without
    it, ConfigError for a `step` where `folder` is no run.
    """
    folder = folder.resolve()
    if (folder / MANIFEST).is_file():
        if step is not None:
            raise ConfigError(f"--step {step} needs a run folder; {folder} is one checkpoint")
        return folder
    if folder.name in (MODEL, ADAPTER) and (folder.parent / MANIFEST).is_file():
        return folder.parent
    inner = folder if folder.name == "checkpoints" else folder / "checkpoints"
    found = list_checkpoints(inner)
    if step is not None and inner.is_dir():
        if (inner / f"step_{step}") not in found:
            names = ", ".join(path.name for path in found) or "no checkpoint"
            raise CheckpointError(f"{inner} has no step_{step}; it has {names}")
        return inner / f"step_{step}"
    best = inner / BEST
    if best.is_dir():
        return best.resolve()
    if not found and inner.is_dir():
        raise CheckpointError(f"{inner} has no complete checkpoint yet")
    return found[-1] if found else None


def check_files(checkpoint: Path, suffix: str = "") -> None:
    """Raise CheckpointError where the checkpoint's model is missing, or a file with this suffix is not as saved."""
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: {error}") from None
    if not (checkpoint / MODEL).is_dir():
        raise CheckpointError(
            f"{checkpoint} has no model: it could not be exported when the run saved it. ./train.sh with the run's "
            "settings and --resume_from auto exports it once the run is at its last step; or name another --step"
        )
    parts = {name: found for name, found in files.items() if name.split("/")[0] in (MODEL, ADAPTER)}
    own = {name: found for name, found in parts.items() if name.endswith(suffix)}
    try:
        problem = compare(checkpoint, own)
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {error.filename} cannot be read: {error.strerror}") from None
    if problem:
        raise CheckpointError(f"{checkpoint} is damaged: {problem}; name another checkpoint")


def _settings(checkpoint: Path | None) -> ModelConfig:
    """The model settings of the checkpoint's run; the defaults where it has none that this version reads."""
    tree = run_config(checkpoint.parent.parent) if checkpoint else {}
    known = {key: value for key, value in (tree.get("model") or {}).items() if key in ModelConfig.model_fields}
    try:
        return ModelConfig.model_validate(known)
    except ValidationError:
        return ModelConfig.model_validate({})


def model_of_run(checkpoint: Path) -> str | None:
    """Return the name of the model that a run started from, None where the manifest does not have it."""
    try:
        return read_manifest(checkpoint)["identity"]["model"].rpartition(" (")[0] or None
    except (ValueError, KeyError):
        return None


def run_config(run: Path) -> dict[str, Any]:
    """Return the configuration that a run wrote, as plain values; empty where it cannot be read."""
    try:
        return read_run_config(run)
    except CheckpointError:
        return {}
