"""FSDP2's collectives among one rank: what it would send to itself stays where it is.

Both follow torch.distributed.fsdp's interface for custom communication (FSDPModule.set_custom_all_gather and
set_custom_reduce_scatter).
"""

from collections.abc import Sequence

import torch
from torch.distributed.fsdp import FSDPModule


class Gather:
    """All-gather whose input is its output: FSDP2 makes it a part of that, here the whole."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *_: object, **__: object) -> None:
        pass


class Reduce:
    """Reduce-scatter whose output is its input: FSDP2 asks for one after the other, and copies between the two."""

    _input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made, self._input = self._input, None
        if made is not None and (made.shape, made.dtype, made.device) == (torch.Size(size), dtype, device):
            return made
        self._input = torch.empty(*size, dtype=dtype, device=device)
        return self._input

    def __call__(self, *_: object, **__: object) -> None:
        raise NotImplementedError("more than one rank")


def stay_home(module: torch.nn.Module) -> None:
    """Use these in all FSDP2 modules of a model that one rank trains."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(Gather())
            part.set_custom_reduce_scatter(Reduce())
