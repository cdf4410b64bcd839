"""Weights and optimiser as a checkpoint holds them: sharded, and readable by another number of ranks."""

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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from verl.utils.device import get_torch_device
from verl.workers.engine import BaseEngine

from sft_recipe.checkpoint.manager import first_failure
from sft_recipe.engine.patches import dtensor_like, without_fsdp1
from sft_recipe.engine.sft_engine import SFTEngine
from sft_recipe.errors import CheckpointError

LARGEST_FILE = 2 << 30  # bytes, unless one tensor has more
WEIGHT = "model."  # begins the names of weights in a stored state


class FsdpState:
    """Saves and loads an FSDP or FSDP2 engine through torch's distributed checkpointing, as safetensors.

    Of a LoRA run the adapters alone are stored. The schedule is a function of the step and needs no storing.
    """

    supports_copy = True

    def __init__(self, engine: SFTEngine, is_lora: bool, group: dist.ProcessGroup | None):
        self.engine = engine
        self.is_lora = is_lora
        self.group = group
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)
        self.copies: dict[str, torch.Tensor] = {}  # kept from save to save: fresh memory costs more than copying

    def size(self) -> int:
        """About how many bytes this rank stores, or copies."""
        weights = [weight for weight in self.engine.module.parameters() if weight.requires_grad or not self.is_lora]
        moments = [value for entry in self.engine.optimizer.state.values() for value in entry.values()]
        return sum(_local(value).nbytes for value in [*weights, *moments] if isinstance(value, torch.Tensor))

    def stage(self, copy: bool) -> Callable[[Path], None]:
        """What writes the state (collective): as it is when that is called, or as it is now, copied to host memory."""
        if not copy:
            return self._write
        with self.engine.on_device():
            copies = {name: self._copy(name, tensor) for name, tensor in self._to_store(*self._state_dicts()).items()}
            get_torch_device().synchronize()
        return lambda folder: self._save(copies, folder)

    def read(self, folder: Path) -> None:
        """Restore what any number of ranks wrote."""
        with self.engine.on_device(), _no_warnings():
            model, optim = self._state_dicts()
            try:  # in place
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

    def _write(self, folder: Path) -> None:
        """Each rank writes its own shards into `folder`."""
        with self.engine.on_device():
            self._save(self._to_store(*self._state_dicts()), folder)

    def _save(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        writer = HuggingFaceStorageWriter(str(folder), _files_of(tensors), save_distributed=True)
        with _no_warnings():
            dcp.save(tensors, storage_writer=writer, process_group=self.group)

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        local = _local(tensor)
        if name not in self.copies:
            self.copies[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        copied = self.copies[name].copy_(local, non_blocking=True)
        return dtensor_like(copied, tensor) if isinstance(tensor, DTensor) else copied

    def _to_store(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All tensors, each once, under one flat dictionary; the optimiser's settings stand in the configuration."""
        tied = self._tied()
        named = {WEIGHT + key: value for key, value in model.items() if key not in tied}
        return named | {f"optim.{key}": value for key, value in optim.items() if isinstance(value, torch.Tensor)}

    def _tied(self) -> dict[str, str]:
        """Names of tied weights and of the weight that each is: {"lm_head.weight": "model.embed_tokens.weight"}."""
        inner: Any = without_fsdp1(self.engine.module)
        return getattr(inner, "all_tied_weights_keys", None) or {}


def _files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that holds each tensor: the same on every rank, which has its parts in its own.

    Each file is made in memory first, with Python's lock held: small ones let the other threads of the process live.
    """
    files, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()  # over all ranks
        if filled and filled + size > LARGEST_FILE:
            number, filled = number + 1, 0
        files[name], filled = number, filled + size
    return files


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a stored state, whole and in host memory, whatever number of ranks wrote it; not collective."""
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if name.startswith(WEIGHT)
    }
    with _no_warnings():
        dcp.load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(WEIGHT): value for name, value in weights.items()}


def restore_tied(model: dict[str, Any], tied: dict[str, str]) -> None:
    """Give tied weights, which are stored once, what was loaded: FSDP1 hands out a copy under each name."""
    for name, source in tied.items():
        if name in model and source in model:
            model[name] = model[source]


def trainable_names(module: torch.nn.Module) -> set[str]:
    """Parameters that are trained, under the names that state dictionaries give them."""
    names = (name for name, parameter in module.named_parameters() if parameter.requires_grad)
    return {name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "") for name in names}


class MegatronState:
    """Leaves saving and loading to verl's Megatron engine, which writes the Hugging Face model among its state.

    Needs GPUs and Megatron-Core; the tests of this project have neither.
    """

    def __init__(self, engine: BaseEngine):
        self.engine = engine

    supports_copy = False

    def size(self) -> int:
        """Not known before it is written."""
        return 0

    def stage(self, copy: bool) -> Callable[[Path], None]:
        """Nothing is copied: verl writes from where the state is."""
        return self._write

    def _write(self, folder: Path) -> None:
        """verl's layout; the model for others is linked to where FSDP runs have it."""
        self.engine.save_checkpoint(local_path=str(folder))
        link = folder.parent / "huggingface"
        if torch.distributed.get_rank() == 0 and (folder / "model/huggingface").is_dir():
            link.symlink_to(Path(folder.name) / "model/huggingface")

    def read(self, folder: Path) -> None:
        """On the same parallel sizes that wrote it."""
        self.engine.load_checkpoint(local_path=str(folder), del_local_after_load=False)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _no_warnings() -> Iterator[None]:
    """torch warns that a single process saves as if it were many; it is one on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
