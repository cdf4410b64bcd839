"""FSDP1 on CPU ranks, which PyTorch refuses: the default strategy on GPUs, run with real collectives of gloo."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch


class _Stream:
    """A stream or an event of a device that computes in order."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


def enable(rank: int) -> None:
    """Make this rank train with FSDP1 where the configuration says so; a `setup` of warm.run."""
    from torch.distributed.fsdp import _common_utils, _init_utils

    from sft_recipe.engine import verl_config
    from sft_recipe.engine.sft_engine import SFTEngine

    verl_config.effective_strategy = lambda fsdp, device: fsdp.strategy
    SFTEngine.is_unsharded = staticmethod(lambda: False)
    _init_utils._check_module_states_for_sync_module_states = lambda *_: None
    handle = SimpleNamespace(
        Event=lambda *_, **__: _Stream(),
        Stream=lambda *_, **__: _Stream(),
        current_stream=lambda *_, **__: _Stream(),
        current_device=lambda *_: torch.device("cpu"),
        stream=lambda *_: nullcontext(),
        synchronize=lambda *_: None,
        is_available=lambda: True,
        set_device=lambda *_: None,
        empty_cache=lambda *_: None,
    )
    from_device = classmethod(lambda cls, device: cls(torch.device("cpu"), handle))
    _common_utils._FSDPDeviceHandle.from_device = from_device
