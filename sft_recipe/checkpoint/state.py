"""Weights and optimizer state as a checkpoint stores them: sharded, and readable by another number of ranks."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_name, get_torch_device
from verl.workers.engine import BaseEngine

from sft_recipe.checkpoint.blockwise import BlockwiseState, plain_name
from sft_recipe.checkpoint.manager import first_failure
from sft_recipe.checkpoint.manifest import Files, list_files
from sft_recipe.checkpoint.writer import OFFSETS, SHARDING, ShardWriter
from sft_recipe.engine.patches import dtensor_like, without_fsdp1
from sft_recipe.engine.sft_engine import SFTEngine
from sft_recipe.errors import CheckpointError, first_line

log = logging.getLogger(__name__)

LARGEST_FILE = 2 << 30  # bytes, unless one tensor has more
WEIGHT, OPTIMIZER = "model.", "optim."  # prefixes of the names of weights and optimizer state in a stored state
OTHER_OPTIMIZER = "; resume with the optim.optimizer_impl and optim.override_optimizer_config that it was trained with"
BASE_DIGEST = "base.digest"  # of the base model's weights in 4 bits, which are not stored but quantized again


class FsdpState:
    """Saves and loads an FSDP or FSDP2 engine through torch's distributed checkpointing, as safetensors.

    A LoRA run stores the adapters only, and a digest of the base where that is in 4 bits. The learning-rate schedule is
    a function of the step and is not stored.
    """

    supports_copy = True

    def __init__(self, engine: SFTEngine, is_lora: bool, group: dist.ProcessGroup | None):
        self.engine = engine
        self.is_lora = is_lora
        self.group = group
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)
        has_blocks = type(engine.optimizer).__module__.startswith("bitsandbytes.")
        self.blocks = BlockwiseState(engine.module, engine.optimizer) if has_blocks else None
        self.can_pin = True
        self.copies: dict[str, torch.Tensor] = {}  # reused by every save: allocating costs more than copying

    def size(self) -> int:
        """Return about how many bytes this rank stores."""
        return sum(self._sizes())

    def copies_size(self) -> int:
        """Return the bytes of host memory that copies of the state take: PyTorch pins blocks of powers of two."""
        is_pinned = self.can_pin and get_device_name() != "cpu"
        return sum(2 ** (size - 1).bit_length() if is_pinned and size else size for size in self._sizes())

    def _sizes(self) -> list[int]:
        weights = [weight for weight in self.engine.module.parameters() if weight.requires_grad or not self.is_lora]
        moments = [value for entry in self.engine.optimizer.state.values() for value in entry.values()]
        return [_local(value).nbytes for value in [*weights, *moments] if isinstance(value, torch.Tensor)]

    def stage(self, copy: bool) -> Callable[[Path], Files]:
        """Return a collective function that writes the state into a folder.

        It returns this rank's files with their fingerprints; they are not synced.

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
                stored = self._to_store(model, optim)
                dcp.load(stored, storage_reader=HuggingFaceStorageReader(str(folder)))
            except CheckpointException as error:
                reason = str(first_failure(error))
                hint = OTHER_OPTIMIZER if OPTIMIZER in reason else ""
                raise CheckpointError(f"{folder} cannot be loaded: {reason}{hint}") from None
            if other := _other_optimizer_state(folder, stored):
                raise CheckpointError(f"{folder} cannot be loaded: {other} is of another optimizer{OTHER_OPTIMIZER}")
            if BASE_DIGEST in stored and int(stored[BASE_DIGEST]) != self.engine.base_digest:
                raise CheckpointError(
                    f"{folder} was trained over other 4-bit weights than those that this run has quantized the base "
                    "model to: resume in the same dtype (fsdp.mixed_precision.param_dtype), on this kind of device, "
                    "with the same version of bitsandbytes"
                )
            restore_tied(model, self._tied())
            set_state_dict(
                self.engine.module,
                () if self.blocks else self.engine.optimizer,
                model_state_dict=model,
                optim_state_dict={} if self.blocks else optim,
                options=replace(self.options, strict=not self.is_lora),
            )
            if self.blocks:
                self.blocks.set_steps(optim)

    def _state_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        optimizer = () if self.blocks else self.engine.optimizer
        found: Any = get_state_dict(self.engine.module, optimizer, options=self.options)
        model, optim = found
        if self.blocks:
            optim = self.blocks.tensors()
        if self.is_lora:
            trained = trainable_names(self.engine.module)
            model = {key: value for key, value in model.items() if key in trained}
        return model, optim

    def _write(self, folder: Path) -> Files:
        """Each rank writes its own shards into `folder`."""
        with self.engine.on_device():
            return self._save(self._to_store(*self._state_dicts()), folder)

    def _save(self, tensors: dict[str, torch.Tensor], folder: Path) -> Files:
        writer = ShardWriter(folder, _files_of(tensors))
        with _no_warnings():
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
        return writer.files

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        local = _local(tensor)
        if name not in self.copies:
            self.copies[name] = self._host_memory(local)
        copy = self.copies[name].copy_(local, non_blocking=True)
        return dtensor_like(copy, tensor) if isinstance(tensor, DTensor) else copy

    def _host_memory(self, local: torch.Tensor) -> torch.Tensor:
        """Memory of the same size on the host, pinned for a GPU; where none can be pinned, copies wait for the GPU."""
        if local.is_cuda and self.can_pin:
            try:
                return torch.empty_like(local, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self.can_pin = False
                log.warning("Host memory cannot be pinned, so that saving blocks longer: %s", first_line(error))
        return torch.empty_like(local, device="cpu")

    def _to_store(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All tensors, each once, in one flat dictionary; the optimizer's settings come from the configuration."""
        tied = self._tied()
        named = {WEIGHT + key: value for key, value in model.items() if key not in tied}
        digest = self.engine.base_digest
        base = {} if digest is None else {BASE_DIGEST: torch.tensor(digest)}
        optimizer = {f"{OPTIMIZER}{key}": value for key, value in optim.items() if isinstance(value, torch.Tensor)}
        return named | optimizer | base

    def _tied(self) -> dict[str, str]:
        """Maps tied weights to the names they are stored under: {"lm_head.weight": "model.embed_tokens.weight"}."""
        inner: Any = without_fsdp1(self.engine.module)
        return getattr(inner, "all_tied_weights_keys", None) or {}


def _other_optimizer_state(folder: Path, tensors: dict[str, torch.Tensor]) -> str | None:
    """Return the name of a stored optimizer state that `tensors` lack, or have as numbers of another kind, if any.

    Loading would leave out the first, and read 8-bit codes as numbers.
    """
    for name, entry in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        if name.startswith(OPTIMIZER) and isinstance(entry, TensorStorageMetadata):
            found, stored = tensors.get(name), entry.properties.dtype
            if found is None or found.dtype.is_floating_point != stored.is_floating_point:
                return name
    return None


def _files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Maps each tensor to the number, from 1, of its file; each rank writes its parts into files with these numbers.

    Several files of a rank can be read at a time.
    """
    files, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()  # over all ranks
        if filled and filled + size > LARGEST_FILE:
            number, filled = number + 1, 0
        files[name], filled = number, filled + size
    return files


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the unsharded value of each weight of a stored state; not collective.

    Memory holds one weight at a time: values are parts of the mapped files, or put together from several.
    """
    parts: dict[str, list[tuple[list[int], Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, "pt")
        offsets = json.loads(file.metadata()[SHARDING])
        for name in file.keys():  # noqa: SIM118  # not a dictionary
            if name.startswith(WEIGHT):
                parts.setdefault(name, []).append((offsets[name][OFFSETS], file.get_slice(name)))
    for name, shards in parts.items():
        yield name.removeprefix(WEIGHT), _joined(shards)


def _joined(shards: list[tuple[list[int], Any]]) -> torch.Tensor:
    """A tensor from its shards in files, each with the index of its first element."""
    if len(shards) == 1:
        return shards[0][1][...]
    ends = [[begin + size for begin, size in zip(start, shard.get_shape(), strict=True)] for start, shard in shards]
    whole = torch.empty([max(sizes) for sizes in zip(*ends, strict=True)], dtype=shards[0][1][...].dtype)
    for (start, shard), end in zip(shards, ends, strict=True):
        whole[tuple(map(slice, start, end))] = shard[...]
    return whole


def restore_tied(model: dict[str, Any], tied: dict[str, str]) -> None:
    """Set tied weights, which are stored once, to what was loaded: FSDP1 returns a copy under each name."""
    for name, source in tied.items():
        if name in model and source in model:
            model[name] = model[source]


def trainable_names(module: torch.nn.Module) -> set[str]:
    """Return the names of the trained parameters, as state dictionaries spell them."""
    return {plain_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad}


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

    def copies_size(self) -> int:
        """Return 0: nothing is copied."""
        return 0

    def stage(self, copy: bool) -> Callable[[Path], Files]:
        """Return a collective function that writes the state at the time of its call; nothing is copied.

        It returns the files that this rank sees; verl does not tell which rank wrote which.
        """
        return self._write

    def _write(self, folder: Path) -> Files:
        """Writes verl's layout, and a link to the Hugging Face model where FSDP runs have it."""
        self.engine.save_checkpoint(local_path=str(folder))
        link = folder.parent / "huggingface"
        if torch.distributed.get_rank() == 0 and (folder / "model/huggingface").is_dir():
            link.symlink_to(Path(folder.name) / "model/huggingface")
        return dict.fromkeys(list_files(folder))

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
