"""Finds models: in a folder, on the hub, in a GGUF file or state dict, or embedded; the result is always a folder."""

from dataclasses import dataclass
from pathlib import Path

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError, is_debugging
from sft_recipe.files import user_path
from sft_recipe.models import minimind
from sft_recipe.models.gguf import EMBEDDED, convert_gguf, embedded_gguf
from sft_recipe.models.state_dict import SUFFIXES, convert_state_dict
from sft_recipe.models.weight_files import check_weight_files


@dataclass(frozen=True)
class ResolvedModel:
    """A ResolvedModel is on this machine: `folder` in Hugging Face format, `name` as the user gave it."""

    folder: Path
    name: str
    notice: str | None = None  # to show to the user


def resolve_model(config: ModelConfig, cache_dir: Path, needs_weights: bool = True) -> ResolvedModel:
    """Return the model, downloaded or converted if necessary; weights are optional if `needs_weights` is False.

    Raises ModelError: no such folder, file or hub model; a folder without config or weights; the hub not reachable.
    """
    try:
        return ResolvedModel(_find(config.path, cache_dir, config.trust_remote_code, needs_weights), config.path)
    except ModelError as error:
        if config.fallback is None:
            raise
        folder = _find(config.fallback, cache_dir, config.trust_remote_code, needs_weights)
        notice = (
            f"{config.path}, the default model, is not on this machine and the hub cannot be reached.\n"
            f"Training {config.fallback} instead. A model named with --model is never replaced."
        )
        if is_debugging():
            notice += f"\n({error})"
        return ResolvedModel(folder, config.fallback, notice)


def resolve_tokenizer(config: ModelConfig, model: ResolvedModel, cache_dir: Path) -> Path:
    """Return the folder of the tokenizer: the model's unless `tokenizer_path` is set. Raises ModelError."""
    if config.tokenizer_path is None:
        is_converted = model.name.startswith(minimind.PREFIX) or model.name.endswith(SUFFIXES)
        if is_converted and not any(model.folder.glob("tokenizer*")):
            raise ModelError(f"{model.name} has no tokenizer beside it: name its folder with --tokenizer_path")
        return model.folder
    return _find(config.tokenizer_path, cache_dir, config.trust_remote_code, needs_weights=False)


def _find(name: str, cache_dir: Path, trust_remote_code: bool, needs_weights: bool = True) -> Path:
    path = user_path(name)
    if name.lower() in (EMBEDDED.lower(), f"huggingfacetb/{EMBEDDED}".lower()) and not path.exists():
        return convert_gguf(embedded_gguf(), cache_dir)
    if name.startswith(minimind.PREFIX):
        return minimind.random_model(name, cache_dir)
    if path.is_file():
        return _convert(path, cache_dir)
    if path.is_dir():
        return _checked_folder(path, needs_weights)
    if name.endswith((".gguf", *SUFFIXES)) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model at {path.absolute()}")
    return _checked_folder(_download(name, trust_remote_code, needs_weights), needs_weights)


def _convert(path: Path, cache_dir: Path) -> Path:
    if path.suffix in SUFFIXES:
        return convert_state_dict(path, cache_dir)
    if path.suffix == ".gguf":
        return convert_gguf(path, cache_dir)
    raise ModelError(
        f"{path} is a file of another type; a model is a folder, a hub id, a .gguf file, or a .pth or .bin state dict"
    )


def _download(name: str, trust_remote_code: bool, needs_weights: bool) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    if needs_weights:
        patterns.append("*.safetensors")
    if trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["original/*"], etag_timeout=5))
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model {name} (or it is private: `hf auth login`), and there is no such folder"
        ) from None
    except HFValidationError:
        raise ModelError(f"{name!r} is not a folder here, and not a valid hub id") from None
    except (LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is neither a folder here nor in the hub's cache, and the hub cannot be reached ({reason}). "
            "Name another folder, or download the model where there is a network."
        ) from None


def _checked_folder(folder: Path, needs_weights: bool) -> Path:
    if not (folder / "config.json").is_file() and needs_weights:
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is a LoRA adapter, not a model; merge it first (--merge_lora saves merged models)"
            )
        raise ModelError(f"{folder} has no model: config.json is missing")
    if needs_weights:
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} holds a LoRA adapter beside the model, and transformers would load both: move "
                "adapter_config.json and adapter_model.safetensors elsewhere, or name a folder with the merged model"
            )
        check_weight_files(folder)
    return folder
