"""A model that one CPU rank holds whole: nothing is sharded, so nothing is gathered, reduced or copied for it.

Where it is computed in another dtype than its weights have, copies in that dtype take their places, and the gradients
of the copies are summed in those of the weights (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section
3.1).
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only


class WholeModel:
    """Lets a model compute in `dtype`, and sums its gradients in fp32, in places that stay from step to step.

    Made in the middle of a backward, they would lie between activations, and leave gaps where later ones do not fit.
    With `converts_frozen` weights that are not trained are converted for good; `layers` are the names of the classes
    whose inputs are cast to `dtype`, as FSDP2 would.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, converts_frozen: bool, layers: Collection[str] = ()):
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.copies: dict[nn.Parameter, nn.Parameter] = {}  # tied weights have one
        self.sums: list[_Sum] = []
        for weight in module.parameters():
            differs = weight.is_floating_point() and weight.dtype != dtype
            if differs and converts_frozen and not weight.requires_grad:
                weight.data = weight.data.to(dtype)
            elif differs:
                self.copies[weight] = nn.Parameter(torch.empty_like(weight, dtype=dtype), weight.requires_grad)
            if weight.requires_grad:
                self.sums.append(_Sum(self.copies.get(weight, weight), weight))
        for part in module.modules():
            self.places += [(part, name, weight) for name, weight in part._parameters.items() if weight in self.copies]
            if self.copies and type(part).__name__ in layers:
                part.register_forward_pre_hook(lambda _, *inputs: _cast(inputs, dtype), with_kwargs=True)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the model computes with copies of its weights as they are now; after it they have their gradients."""
        with torch.no_grad():
            for weight, copy in self.copies.items():
                copy.copy_(weight)
        for part, name, weight in self.places:
            part._parameters[name] = self.copies[weight]
        for one in self.sums:
            one.is_empty = True
        try:
            yield
        finally:
            for part, name, weight in self.places:
                part._parameters[name] = weight
        for one in self.sums:
            one.hand_over()


class _Sum:
    """Of what backward passes leave in the gradient of `leaf`, for that of `weight`."""

    def __init__(self, leaf: nn.Parameter, weight: nn.Parameter):
        self.weight = weight
        self.total = torch.empty_like(weight, dtype=torch.float32)
        self.is_empty = True
        leaf.register_post_accumulate_grad_hook(self.add)

    def add(self, leaf: torch.Tensor) -> None:
        assert leaf.grad is not None
        if self.is_empty:
            self.total.copy_(leaf.grad)
        else:
            self.total.add_(leaf.grad)
        self.is_empty, leaf.grad = False, None

    def hand_over(self) -> None:
        if not self.is_empty:
            self.weight.grad = self.total.to(self.weight.dtype)  # in fp32 the sum itself


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, inputs)


def clip_whole(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale all gradients, none of which is shared with other ranks, to a norm of at most `limit`; returns that before.

    As torch.nn.utils.clip_grad_norm_, without DTensor's planning of how shards of each shape would be combined.
    """
    found = (parameter.grad for parameter in parameters)
    gradients = [part.to_local() if isinstance(part, DTensor) else part for part in found if part is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
