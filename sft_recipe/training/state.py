"""Weights and optimiser as a checkpoint holds them: sharded, and readable by another number of ranks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from verl.workers.engine import BaseEngine

from sft_recipe.engine.engine import SFTEngine


class FsdpState:
    """Saves and loads an FSDP or FSDP2 engine through torch's distributed checkpointing, as safetensors.

    Of a LoRA run the adapters alone are stored. The schedule is a function of the step and needs no storing.
    """

    def __init__(self, engine: SFTEngine, is_lora: bool):
        self.engine = engine
        self.options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=is_lora)

    def write(self, folder: Path) -> None:
        """Each rank writes its own shards into `folder`."""
        with self.engine.resident(), _no_warnings():
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(self._to_store(*self._state_dicts()), storage_writer=writer)

    def read(self, folder: Path) -> None:
        """Restore what any number of ranks wrote."""
        with self.engine.resident(), _no_warnings():
            model, optim = self._state_dicts()
            # The tensors are loaded in place; tied weights, stored once, are the same memory under a second name.
            dcp.load(self._to_store(model, optim), storage_reader=HuggingFaceStorageReader(str(folder)))
            set_state_dict(
                self.engine.module,
                self.engine.optimizer,
                model_state_dict=model,
                optim_state_dict=optim,
                options=replace(self.options, strict=not self.options.ignore_frozen_params),
            )

    def _state_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return get_state_dict(self.engine.module, self.engine.optimizer, options=self.options)

    def _to_store(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All tensors, each once, under one flat dictionary; the optimiser's settings stand in the configuration."""
        inner: Any = getattr(self.engine.module, "_fsdp_wrapped_module", self.engine.module)
        tied = getattr(inner, "all_tied_weights_keys", None) or {}
        named = {f"model.{key}": value for key, value in model.items() if key not in tied}
        return named | {f"optim.{key}": value for key, value in optim.items() if isinstance(value, torch.Tensor)}


class MegatronState:
    """Leaves saving and loading to verl's Megatron engine, which writes the Hugging Face model among its state.

    Needs GPUs and Megatron-Core; the tests of this project have neither.
    """

    def __init__(self, engine: BaseEngine):
        self.engine = engine

    def write(self, folder: Path) -> None:
        """verl's layout; the model for others is linked to where FSDP runs have it."""
        self.engine.save_checkpoint(local_path=str(folder))
        link = folder.parent / "huggingface"
        if torch.distributed.get_rank() == 0 and (folder / "model/huggingface").is_dir():
            link.symlink_to(Path(folder.name) / "model/huggingface")

    def read(self, folder: Path) -> None:
        """On the same parallel sizes that wrote it."""
        self.engine.load_checkpoint(local_path=str(folder), del_local_after_load=False)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """torch warns that a single process saves as if it were many; it is one on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
