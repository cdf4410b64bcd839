"""Converts a file of weights to a Hugging Face folder in the cache, once and completely or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sft_recipe.errors import ModelError
from sft_recipe.files import locked


def convert_once(
    name: str, digest: str, cache_dir: Path, write: Callable[[Path], None], marker: str = "config.json"
) -> Path:
    """Return the folder `models/<stem of name>-<digest>` below `cache_dir`; `write` makes it if it does not exist yet;
    a complete folder holds the file `marker`.

    Of several processes one converts. Raises ModelError where the folder cannot be written.
    """
    folder = cache_dir / "models"
    target = folder / f"{Path(name).stem}-{digest}"
    try:
        if (target / marker).is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{target.name}.lock"):
            if not (target / marker).is_file():
                print(f"Converting {Path(name).name} to {target} (once)", flush=True)
                _write_atomically(target, write)
        return target
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{name} cannot be converted into {folder}: {error}") from None


def _write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Write a partial folder, which is renamed when it is complete and removed on failure."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
