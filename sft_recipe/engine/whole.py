"""A model that one CPU rank holds whole: nothing is sharded, so nothing is gathered, reduced or copied for it.

Where it is computed in another dtype than its weights have, copies in that dtype take their places, and the gradients
of the copies are summed in those of the weights (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section
3.1).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class WholeModel:
    """Lets a model compute in `dtype`, and keeps its gradients where they are from step to step.

    Made in the middle of a backward, they would lie between activations, and leave gaps where later ones do not fit.
    Weights that are not trained need no other dtype than that of the computation, and are converted for good.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.copies: dict[nn.Parameter, nn.Parameter] = {}  # tied weights have one
        for weight in module.parameters():
            differs = weight.is_floating_point() and weight.dtype != dtype
            if not weight.requires_grad:
                weight.data = weight.data.to(dtype) if differs else weight.data
                continue
            if differs:
                self.copies[weight] = nn.Parameter(torch.empty_like(weight, dtype=dtype))
            _sum_gradients(self.copies.get(weight, weight), weight)
        for part in module.modules():
            self.places += [(part, name, weight) for name, weight in part._parameters.items() if weight in self.copies]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the model computes with copies of its weights as they are now."""
        with torch.no_grad():
            for weight, copy in self.copies.items():
                copy.copy_(weight)
        for part, name, weight in self.places:
            part._parameters[name] = self.copies[weight]
        try:
            yield
        finally:
            for part, name, weight in self.places:
                part._parameters[name] = weight


def _sum_gradients(leaf: nn.Parameter, weight: nn.Parameter) -> None:
    """Sum what backward passes leave in `leaf.grad` in one tensor, which is `weight.grad` until that is set to None."""
    total = torch.empty_like(weight)

    def add(_: torch.Tensor) -> None:
        assert leaf.grad is not None
        if weight.grad is not total:  # what autograd made, or nothing yet
            total.copy_(leaf.grad)
            weight.grad = total
        elif leaf is not weight:
            total.add_(leaf.grad)
        if leaf is not weight:
            leaf.grad = None

    leaf.register_post_accumulate_grad_hook(add)


def clip_whole(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale all gradients, none of which is shared with other ranks, to a norm of at most `limit`; returns that before.

    As torch.nn.utils.clip_grad_norm_, without DTensor's planning of how shards of each shape would be combined.
    """
    found = (parameter.grad for parameter in parameters)
    gradients = [part.to_local() if isinstance(part, DTensor) else part for part in found if part is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
