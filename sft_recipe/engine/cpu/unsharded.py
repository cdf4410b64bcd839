"""A model that one CPU rank holds whole: nothing is sharded, so nothing is gathered, reduced or copied for it.

Where it is computed in another dtype than its weights have, copies in that dtype take their places, and the gradients
of the copies are summed in those of the weights (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section
3.1). Linear maps and embeddings add to the sums themselves, as in Megatron's gradient accumulation fusion.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from sft_recipe.engine.cpu.fused_lora import adapted_forward
from sft_recipe.engine.cpu.recompute import Recomputation

FEW = 16  # inputs of a map, as of an adapter's second one: BLAS makes the transpose of such a product up to 5x as fast


class UnshardedModel:
    """Lets a model compute in `dtype`, and sums its gradients in fp32, in places that stay from step to step.

    Made in the middle of a backward, they would lie between activations, and leave gaps where later ones do not fit.
    With `converts_frozen` weights that are not trained are converted for good; `layers` are the names of the classes
    whose inputs are cast to `dtype`, as FSDP2 would.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, converts_frozen: bool, layers: Collection[str] = ()):
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.copies: dict[nn.Parameter, nn.Parameter] = {}  # tied weights have one
        self.sums: dict[nn.Parameter, GradAccumulator] = {}
        for weight in module.parameters():
            differs = weight.is_floating_point() and weight.dtype != dtype
            if differs and converts_frozen and not weight.requires_grad:
                weight.data = weight.data.to(dtype)
            elif differs:
                self.copies[weight] = nn.Parameter(torch.empty_like(weight, dtype=dtype), weight.requires_grad)
            if weight.requires_grad:
                self.sums[weight] = GradAccumulator(self.copies.get(weight, weight), weight)
        for part in module.modules():
            forward = adapted_forward(part)
            if forward is None and part._parameters.get("weight") in self.sums:
                forward = _adding_forward(part)
            if forward:
                part.forward = MethodType(forward, part)
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
        for one in self.sums.values():
            one.added = 0
        try:
            yield
        finally:
            for part, name, weight in self.places:
                part._parameters[name] = weight
        for one in self.sums.values():
            one.hand_over()


class GradAccumulator:
    """Of what backward passes leave in the gradient of `leaf`, or add themselves, for that of `weight`."""

    def __init__(self, leaf: nn.Parameter, weight: nn.Parameter):
        self.weight = weight
        self.total = torch.empty_like(weight, dtype=torch.float32)
        self.added = 0  # in this step
        leaf.register_post_accumulate_grad_hook(self.add)
        # Made now and kept: else the first forward makes it, in the middle of its activations.
        self.node = torch.autograd.graph.get_gradient_edge(leaf).node
        leaf.grad_accumulator = self

    def add(self, leaf: torch.Tensor) -> None:
        if leaf.grad is not None:  # None, where all of it was added without one
            self._add(leaf.grad)
        leaf.grad = None

    def add_product(self, of_outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        """For a weight (outputs, inputs): the gradient (..., outputs), and what met the weight (..., inputs)."""
        left, right = of_outputs.flatten(0, -2).T, inputs.flatten(0, -2)
        if right.shape[1] <= FEW:
            self._add((right.T @ left.T).T)
        elif left.dtype != torch.float32:
            self._add(left @ right)
        else:
            torch.addmm(self.total, left, right, beta=1 if self.added else 0, out=self.total)
            self.added += 1

    def add_rows(self, rows: torch.Tensor, of_rows: torch.Tensor) -> None:
        """For an embedding (rows, width): which of its rows were taken (taken,), their gradients (taken, width)."""
        if not self.added:
            self.total.zero_()
        self.total.index_add_(0, rows, of_rows.float())
        self.added += 1

    def _add(self, part: torch.Tensor) -> None:
        if self.added:
            self.total.add_(part)
        else:
            self.total.copy_(part)
        self.added += 1

    def hand_over(self) -> None:
        if self.added:
            self.weight.grad = self.total.to(self.weight.dtype)  # in fp32 the sum itself


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        computed = inputs.to(weight.dtype)
        ctx.make, sources = Recomputation.saved_or_recompute(inputs, computed)
        ctx.save_for_backward(weight, *sources)
        ctx.sum = weight.grad_accumulator
        return F.linear(computed, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient] = gradients
        weight, *sources = ctx.saved_tensors
        ctx.sum.add_product(gradient, ctx.make(*sources).to(weight.dtype))
        of_inputs = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_inputs, None, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.padding, ctx.sum = padding, weight.grad_accumulator
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        [gradient] = gradients
        [rows] = ctx.saved_tensors
        learnt = rows != (-1 if ctx.padding is None else ctx.padding)
        ctx.sum.add_rows(rows[learnt], gradient[learnt])
        return None, None, None


def _adding_forward(module: nn.Module) -> Callable | None:
    """For modules that have their class's own, as most have."""
    if "forward" in vars(module):
        return None
    if type(module).forward is nn.Linear.forward:
        return lambda self, input: _Linear.apply(input, self.weight, self.bias)
    if type(module).forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return lambda self, input: _Embedding.apply(input, self.weight, self.padding_idx)
    return None


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, inputs)


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale all gradients, none of which is shared with other ranks, to a norm of at most `limit`; returns that before.

    As torch.nn.utils.clip_grad_norm_, without DTensor's planning of how shards of each shape would be combined.
    """
    found = (parameter.grad for parameter in parameters)
    gradients = [part.to_local() if isinstance(part, DTensor) else part for part in found if part is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
