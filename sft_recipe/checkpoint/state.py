"""Weights and optimizer state as a checkpoint stores them: sharded, and readable by another number of ranks."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from verl.utils.device import get_torch_device
from verl.workers.engine import BaseEngine

from sft_recipe.checkpoint.manager import first_failure
from sft_recipe.checkpoint.manifest import list_files
from sft_recipe.engine.patches import dtensor_like, without_fsdp1
from sft_recipe.engine.sft_engine import SFTEngine
from sft_recipe.errors import CheckpointError

LARGEST_FILE = 2 << 30  # bytes, unless one tensor has more
WEIGHT = "model."  # prefix of the names of weights in a stored state


class FsdpState:
    """Saves and loads an FSDP or FSDP2 engine through torch's distributed checkpointing, as safetensors.

    A LoRA run stores the adapters only. The learning-rate schedule is a function of the step and is not stored.
    """

    supports_copy = True

    def __init__(self, engine: SFTEngine, is_lora: bool, group: dist.ProcessGroup | None):
        self.engine = engine
        self.is_lora = is_lora
        self.group = group
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)
        self.copies: dict[str, torch.Tensor] = {}  # reused by every save: allocating costs more than copying

    def size(self) -> int:
        """Return about how many bytes this rank stores, or copies."""
        weights = [weight for weight in self.engine.module.parameters() if weight.requires_grad or not self.is_lora]
        moments = [value for entry in self.engine.optimizer.state.values() for value in entry.values()]
        return sum(_local(value).nbytes for value in [*weights, *moments] if isinstance(value, torch.Tensor))

    def stage(self, copy: bool) -> Callable[[Path], set[str]]:
        """Return a collective function that writes the state into a folder, and returns the files of this rank.

        With `copy` it writes the state of now, from a copy in host memory; else the state at the time of its call.
        """
        if not copy:
            return self._write
        with self.engine.on_device():
            copies = {name: self._copy(name, tensor) for name, tensor in self._to_store(*self._state_dicts()).items()}
            get_torch_device().synchronize()
        return lambda folder: self._save(copies, folder)

    def read(self, folder: Path) -> None:
        """Restore a state that any number of ranks wrote. Raises CheckpointError."""
        with self.engine.on_device(), _no_warnings():
            model, optim = self._state_dicts()
            try:  # loads into the tensors
                dcp.load(self._to_store(model, optim), storage_reader=HuggingFaceStorageReader(str(folder)))
            except CheckpointException as error:
                raise CheckpointError(f"{folder} cannot be loaded: {first_failure(error)}") from None
            restore_tied(model, self._tied())
            set_state_dict(
                self.engine.module,
                self.engine.optimizer,
                model_state_dict=model,
                optim_state_dict=optim,
                options=replace(self.options, strict=not self.is_lora),
            )

    def _state_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        model, optim = get_state_dict(self.engine.module, self.engine.optimizer, options=self.options)
        if self.is_lora:
            trained = trainable_names(self.engine.module)
            model = {key: value for key, value in model.items() if key in trained}
        return model, optim

    def _write(self, folder: Path) -> set[str]:
        """Each rank writes its own shards into `folder`."""
        with self.engine.on_device():
            return self._save(self._to_store(*self._state_dicts()), folder)

    def _save(self, tensors: dict[str, torch.Tensor], folder: Path) -> set[str]:
        writer = _Writer(str(folder), _files_of(tensors), save_distributed=True)
        with _no_warnings():
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
        return writer.files

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        local = _local(tensor)
        if name not in self.copies:
            self.copies[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        copy = self.copies[name].copy_(local, non_blocking=True)
        return dtensor_like(copy, tensor) if isinstance(tensor, DTensor) else copy

    def _to_store(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All tensors, each once, in one flat dictionary; the optimizer's settings come from the configuration."""
        tied = self._tied()
        named = {WEIGHT + key: value for key, value in model.items() if key not in tied}
        return named | {f"optim.{key}": value for key, value in optim.items() if isinstance(value, torch.Tensor)}

    def _tied(self) -> dict[str, str]:
        """Maps tied weights to the names they are stored under: {"lm_head.weight": "model.embed_tokens.weight"}."""
        inner: Any = without_fsdp1(self.engine.module)
        return getattr(inner, "all_tied_weights_keys", None) or {}


class _Writer(HuggingFaceStorageWriter):
    """Remembers the names of the files that this rank writes, in `files`."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner)
        self.files = {result.storage_data.relative_path for result in results.wait()}
        return results


def _files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Maps each tensor to the number, from 1, of its file; each rank writes its parts into files with these numbers.

    A file is built in memory first, while Python's global lock is held: small files let the training thread run.
    """
    files, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()  # over all ranks
        if filled and filled + size > LARGEST_FILE:
            number, filled = number + 1, 0
        files[name], filled = number, filled + size
    return files


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a stored state by name, unsharded and in host memory; not collective."""
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if name.startswith(WEIGHT) and isinstance(meta, TensorStorageMetadata)
    }
    with _no_warnings():
        dcp.load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(WEIGHT): value for name, value in weights.items()}


def restore_tied(model: dict[str, Any], tied: dict[str, str]) -> None:
    """Set tied weights, which are stored once, to what was loaded: FSDP1 returns a copy under each name."""
    for name, source in tied.items():
        if name in model and source in model:
            model[name] = model[source]


def trainable_names(module: torch.nn.Module) -> set[str]:
    """Return the names of the trained parameters, as state dictionaries spell them."""
    names = (name for name, parameter in module.named_parameters() if parameter.requires_grad)
    return {name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "") for name in names}


class MegatronState:
    """Saves and loads verl's Megatron engine by its own means, which include the Hugging Face model.

    Needs GPUs and Megatron-Core; the tests of this project have neither.
    """

    supports_copy = False

    def __init__(self, engine: BaseEngine):
        self.engine = engine

    def size(self) -> int:
        """Return 0: the size is not known before it is written."""
        return 0

    def stage(self, copy: bool) -> Callable[[Path], set[str]]:
        """Return a collective function that writes the state at the time of its call; nothing is copied."""
        return self._write

    def _write(self, folder: Path) -> set[str]:
        """Writes verl's layout, and a link to the Hugging Face model where FSDP runs have it."""
        self.engine.save_checkpoint(local_path=str(folder))
        link = folder.parent / "huggingface"
        if torch.distributed.get_rank() == 0 and (folder / "model/huggingface").is_dir():
            link.symlink_to(Path(folder.name) / "model/huggingface")
        return set(list_files(folder))

    def read(self, folder: Path) -> None:
        """Restore a state that the same parallel sizes wrote."""
        self.engine.load_checkpoint(local_path=str(folder), del_local_after_load=False)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _no_warnings() -> Iterator[None]:
    """torch warns that a single process saves without a process group, which is intended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
