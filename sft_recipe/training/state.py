"""Weights and optimiser as a checkpoint holds them: sharded, and readable by another number of ranks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from verl.workers.engine import BaseEngine

from sft_recipe.engine.engine import SFTEngine
from sft_recipe.errors import CheckpointError
from sft_recipe.training.checkpoint import first_failure


class FsdpState:
    """Saves and loads an FSDP or FSDP2 engine through torch's distributed checkpointing, as safetensors.

    Of a LoRA run the adapters alone are stored. The schedule is a function of the step and needs no storing.
    """

    def __init__(self, engine: SFTEngine, is_lora: bool):
        self.engine = engine
        self.is_lora = is_lora
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)

    def write(self, folder: Path) -> None:
        """Each rank writes its own shards into `folder`."""
        with self.engine.resident(), _no_warnings():
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(self._to_store(*self._state_dicts()), storage_writer=writer)

    def read(self, folder: Path) -> None:
        """Restore what any number of ranks wrote."""
        with self.engine.resident(), _no_warnings():
            model, optim = self._state_dicts()
            try:  # in place
                dcp.load(self._to_store(model, optim), storage_reader=HuggingFaceStorageReader(str(folder)))
            except CheckpointException as error:
                raise CheckpointError(f"{folder} cannot be loaded: {first_failure(error)}") from None
            take_tied(model, self._tied())
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

    def _to_store(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All tensors, each once, under one flat dictionary; the optimiser's settings stand in the configuration."""
        tied = self._tied()
        named = {f"model.{key}": value for key, value in model.items() if key not in tied}
        return named | {f"optim.{key}": value for key, value in optim.items() if isinstance(value, torch.Tensor)}

    def _tied(self) -> dict[str, str]:
        """Names of tied weights and of the weight that each is: {"lm_head.weight": "model.embed_tokens.weight"}."""
        inner: Any = getattr(self.engine.module, "_fsdp_wrapped_module", self.engine.module)
        return getattr(inner, "all_tied_weights_keys", None) or {}


def take_tied(model: dict[str, Any], tied: dict[str, str]) -> None:
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
