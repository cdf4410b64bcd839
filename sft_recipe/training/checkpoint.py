"""Checkpoints: written under another name and renamed when whole; found, checked, resumed from, and retired."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from sft_recipe.errors import CheckpointError

if TYPE_CHECKING:
    from sft_recipe.engine.engine import SFTEngine

STATE = "state"  # shards of weights and optimiser, safetensors
TRAINER_STATE = "trainer_state.json"
MANIFEST = "manifest.json"  # every file and its size; written last


def find_checkpoint(spec: str, folder: Path) -> Path | None:
    """The checkpoint that `trainer.resume_from` means; None where `auto` finds none in `folder`.

    Raises CheckpointError: no such folder, not a checkpoint, an incomplete one.
    """
    if spec == "auto":
        complete = [path for path in list_checkpoints(folder) if not problems_of(path)]
        return complete[-1] if complete else None
    path = Path(spec).expanduser()
    if not path.is_dir():
        there = ", ".join(found.name for found in list_checkpoints(path.parent)) if path.parent.is_dir() else ""
        raise CheckpointError(f"there is no checkpoint {path}" + (f"; beside it stand {there}" if there else ""))
    inner = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inner and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is a folder of checkpoints, not one; name one of them, such as {inner[-1]}")
    if found := problems_of(path):
        raise CheckpointError(f"{path} is no complete checkpoint: {found}")
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """step_N folders, oldest step first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def problems_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files compared with its manifest; empty where nothing is."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no readable {MANIFEST}"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return ""


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Step, counts and identity that a checkpoint was saved with."""
    return json.loads((checkpoint / TRAINER_STATE).read_text())


def check_identity(checkpoint: Path, ours: dict[str, Any]) -> None:
    """A run continues with the same model, data and batch plan. Raises CheckpointError that names what differs."""
    theirs = read_trainer_state(checkpoint)["identity"]
    lines = [
        f"  - {key}: {theirs.get(key)} there, {ours.get(key)} here" for key in ours if theirs.get(key) != ours.get(key)
    ]
    if lines:
        message = [f"{checkpoint} belongs to another run; it cannot be continued with this one's settings:", *lines]
        raise CheckpointError(
            "\n".join([*message, "Use the settings of that run, or start anew in another --output_dir."])
        )


def check_room_for_run(folder: Path, resume: Path | None) -> None:
    """A run never overwrites another's checkpoints. Raises CheckpointError that says what is there and what to do."""
    there = list_checkpoints(folder)
    if resume is None and there:
        raise CheckpointError(
            f"{folder} holds {there[-1].name} of an earlier run. Continue it with --resume_from auto, "
            "or write this run elsewhere with --output_dir FOLDER, or remove it."
        )
    if resume is None or resume.parent.resolve() != folder.resolve():
        if there:
            raise CheckpointError(
                f"{folder} holds {there[-1].name} of another run; write this one elsewhere with --output_dir"
            )
        return
    newer = [path.name for path in there if _step(path) > _step(resume)]
    if newer:
        raise CheckpointError(
            f"{folder} holds {', '.join(newer)}, newer than {resume.name}. Continue the newest with --resume_from "
            "auto, or write elsewhere with --output_dir FOLDER, or remove the newer ones."
        )


class Checkpoints:
    """Saves and loads one run's checkpoints in `folder`; collective, called by every rank."""

    def __init__(self, engine: "SFTEngine", folder: Path, keep: int | None, save_model: Callable, is_lora: bool):
        self.engine = engine
        self.folder = folder
        self.keep = keep
        self.save_model = save_model
        self.options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=is_lora)

    def save(self, step: int, trainer_state: dict[str, Any]) -> Path:
        """Write step_N: sharded state, trainer state, the model for others; then make it whole by one rename."""
        final, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"
        is_first = dist.get_rank() == 0
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / STATE).mkdir(parents=True)
        dist.barrier()
        with self.engine.resident(), _quiet_dcp():
            writer = HuggingFaceStorageWriter(str(partial / STATE), save_distributed=True)
            dcp.save(self._to_store(*self._state_dicts()), storage_writer=writer)
            self.save_model(self.engine.module, partial)
        if is_first:
            (partial / TRAINER_STATE).write_text(json.dumps(trainer_state, indent=2))
            _write_manifest(partial)
            partial.rename(final)
            _sync_folder(self.folder)
            self._retire(final)
        dist.barrier()
        return final

    def load(self, checkpoint: Path) -> None:
        """Restore weights, optimiser and schedule, whatever the number of ranks that wrote them."""
        with self.engine.resident(), _quiet_dcp():
            model, optim = self._state_dicts()
            # The tensors are loaded in place; tied weights, stored once, are the same memory under a second name.
            dcp.load(self._to_store(model, optim), storage_reader=HuggingFaceStorageReader(str(checkpoint / STATE)))
            set_state_dict(
                self.engine.module,
                self.engine.optimizer,
                model_state_dict=model,
                optim_state_dict=optim,
                options=replace(self.options, strict=not self.options.ignore_frozen_params),
            )
        self.engine.set_step(read_trainer_state(checkpoint)["step"])

    def _state_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return get_state_dict(self.engine.module, self.engine.optimizer, options=self.options)

    def _to_store(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All tensors, each once, under one flat dictionary; the optimiser's settings stand in the configuration."""
        inner: Any = getattr(self.engine.module, "_fsdp_wrapped_module", self.engine.module)
        tied = getattr(inner, "all_tied_weights_keys", None) or {}
        named = {f"model.{key}": value for key, value in model.items() if key not in tied}
        return named | {f"optim.{key}": value for key, value in optim.items() if isinstance(value, torch.Tensor)}

    def _retire(self, newest: Path) -> None:
        if self.keep is not None:
            for path in list_checkpoints(self.folder)[: -self.keep]:
                if path != newest:
                    shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size
            _sync_file(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2))
    _sync_file(manifest)
    for path in [folder, *(inner for inner in folder.rglob("*") if inner.is_dir())]:
        _sync_folder(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    """torch warns that a single process saves as if it were many; it is one on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
