"""Exports a trained model into a new folder, and verifies what was written before the folder gets its name."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers.utils.logging import disable_progress_bar

from sft_recipe.errors import ConfigError, PreflightError
from sft_recipe.export.gguf import check_architecture
from sft_recipe.export.gguf_folder import write_gguf_folder
from sft_recipe.export.hf_folder import write_hf_folder
from sft_recipe.export.model_card import model_card
from sft_recipe.export.options import ExportOptions
from sft_recipe.export.pth_folder import write_pth_folder
from sft_recipe.export.source import Source
from sft_recipe.export.trained import load_trained, trained_config
from sft_recipe.export.verification import (
    Verification,
    make_reference,
    rounding_remark,
    verify_export,
    verify_tokens,
)
from sft_recipe.files import sync
from sft_recipe.progress import progress_bar

WRITERS = {"hf": write_hf_folder, "gguf": write_gguf_folder, "pth": write_pth_folder}


@dataclass(frozen=True)
class Export:
    """An Export describes what was written into `folder`; `remarks` say what it lacks, and why."""

    folder: Path
    kind: str
    dtype: str
    files: dict[str, int]
    verification: Verification
    remarks: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON can hold it."""
        return asdict(self) | {"folder": str(self.folder)}


def export_model(source: Source, options: ExportOptions, out: Path, show_progress: bool) -> Export:
    """Write the model into the new folder `out`; returns what was written and how it compares with the trained model.

    Nothing is left where it fails. Raises ConfigError for options that do not fit the model, PreflightError where
    `out` holds something or cannot be written, ModelError where the export does not compute what the model computes.
    """
    if options.format == "gguf":
        check_architecture(trained_config(source))
    _check_options(source, options)
    disable_progress_bar()
    with _new_folder(out) as folder:
        with progress_bar("computing the trained model's answers", show=show_progress):
            trained = load_trained(source)
            reference = make_reference(trained.model, trained.tokenizer)
        written = WRITERS[options.format](trained, options, folder, show_progress)
        with progress_bar("loading the export back", show=show_progress):
            verify_tokens(written.prompt_ids, reference)
            verification = verify_export(
                written.load(), reference, written.bound, None if source.adapter else trained.model
            )
        if verification.is_rounding:
            written.remarks.append(rounding_remark(written.dtype, written.bound))
        (folder / "README.md").write_text(model_card(source, written, verification, out.name), encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Export(out, written.kind, written.dtype, files, verification, written.remarks)


def _check_options(source: Source, options: ExportOptions) -> None:
    if options.merge and source.adapter is None:
        raise ConfigError(f"{source.name} is a complete model, with no adapter to merge: leave --merge out")
    if options.format == "gguf" and source.adapter and not options.merge:
        raise ConfigError(f"{source.name} is an adapter, and a GGUF file holds a complete model: add --merge")
    if options.format == "gguf" and options.dtype:
        raise ConfigError(f"--dtype {options.dtype} is for --format hf; the weights of a GGUF file are in --quant")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out` that gets its name at the end, and is removed where the context fails."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise PreflightError(f"--out {out} exists already and is not an empty folder; name a new one, or remove it")
    partial = out.absolute().with_name(f".{out.absolute().name}.{uuid4().hex[:12]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            path.chmod(partial.stat().st_mode & 0o666)  # safetensors writes files that only the owner can read
            sync(path)
        partial.rename(out.absolute())
    except OSError as error:
        raise PreflightError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
