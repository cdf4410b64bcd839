"""FSDP2 with one rank: what it would send to itself stays where it is, and what is whole is not taken for a part.

Reduce follows torch.distributed.fsdp's interface for custom communication, FSDPModule.set_custom_reduce_scatter.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Reduce:
    """Reduce-scatter whose output is its input: FSDP2 asks for one after the other, and copies between the two.

    For CPUs: a GPU's streams may use the memory of the input again before all has been read from the output.
    """

    _input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made, self._input = self._input, None
        if made is not None and (made.shape, made.dtype, made.device) == (torch.Size(size), dtype, device):
            return made
        self._input = torch.empty(*size, dtype=dtype, device=device)
        return self._input

    def __call__(self, *_: object, **__: object) -> None:
        """FSDP2 calls this among several ranks only."""
        raise AssertionError("a reduce-scatter of one rank was asked to send")


def stay_home(module: torch.nn.Module) -> None:
    """Use it in all FSDP2 modules of a model that one rank trains on a CPU."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_reduce_scatter(Reduce())


def clip_whole(parameters: Iterable[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Scale all gradients so that their norm is at most `limit`; returns the norm before.

    As torch.nn.utils.clip_grad_norm_, without DTensor's planning of how shards of each shape would be combined.
    """
    found = (parameter.grad for parameter in parameters)
    gradients = [part.to_local() if isinstance(part, DTensor) else part for part in found if part is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
