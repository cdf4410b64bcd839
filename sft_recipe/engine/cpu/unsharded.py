"""A model that one CPU rank holds unsharded: nothing is gathered, reduced or copied between ranks.

Where the model computes in another dtype than its weights have, copies in that dtype replace the weights, and the
gradients of the copies are summed in fp32 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.1).
Linear layers and embeddings add to the sums themselves, as in Megatron's gradient accumulation fusion.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sft_recipe.engine import patches
from sft_recipe.engine.cpu.recompute import Recomputation

NARROW = 16  # inputs of a linear layer, such as an adapter's second: BLAS computes the transpose up to 5x as fast


class UnshardedModel:
    """Lets a model compute in `dtype`, and sums its gradients in fp32, in buffers that stay from step to step.

    Buffers that were allocated during a backward pass would lie between activations and fragment the heap. `layers` are
    the names of the classes whose inputs are cast to `dtype`, as FSDP2 does. torch.compile cannot trace how linear
    layers and embeddings add to the sums: if `is_compiled`, autograd computes their gradients first.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, layers: Collection[str] = (), is_compiled: bool = False):
        self.replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.copies: dict[nn.Parameter, nn.Parameter] = {}  # tied weights have one
        self.accumulators: dict[nn.Parameter, GradAccumulator] = {}
        for weight in module.parameters():
            if weight.is_floating_point() and weight.dtype != dtype:
                self.copies[weight] = nn.Parameter(torch.empty_like(weight, dtype=dtype), weight.requires_grad)
            if weight.requires_grad:
                self.accumulators[weight] = GradAccumulator(self.copies.get(weight, weight), weight)
        adds = not is_compiled
        for part in module.modules():
            weights = dict(part.named_parameters(recurse=False, remove_duplicate=False))
            forward = _accumulating_forward(part) if adds and weights.get("weight") in self.accumulators else None
            if forward:
                part.forward = MethodType(forward, part)  # type: ignore[method-assign]
            self.replaced += [(part, name, weight) for name, weight in weights.items() if weight in self.copies]
            if self.copies and type(part).__name__ in layers:
                part.register_forward_pre_hook(lambda _, *inputs: _cast(inputs, dtype), with_kwargs=True)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the model computes with copies of its weights; afterwards the weights have their gradients."""
        with torch.no_grad():
            for weight, copy in self.copies.items():
                copy.copy_(weight)
        for part, name, weight in self.replaced:
            patches.replace_parameter(part, name, self.copies[weight])
        for accumulator in self.accumulators.values():
            accumulator.added = 0
        try:
            yield
        finally:
            for part, name, weight in self.replaced:
                patches.replace_parameter(part, name, weight)
        for accumulator in self.accumulators.values():
            accumulator.write_gradient()


class GradAccumulator:
    """The sum of the gradients that backward passes leave in `leaf` or add here, for the gradient of `weight`."""

    def __init__(self, leaf: nn.Parameter, weight: nn.Parameter):
        self.weight = weight
        self.total = torch.empty_like(weight, dtype=torch.float32)
        self.added = 0  # in this step
        leaf.register_post_accumulate_grad_hook(self.add)
        # Autograd's node for the leaf is kept: otherwise each forward pass allocates one among its activations.
        self.node = torch.autograd.graph.get_gradient_edge(leaf).node
        leaf.grad_accumulator = self  # type: ignore[attr-defined]

    def add(self, leaf: torch.Tensor) -> None:
        """Move the gradient of `leaf` to the sum; None where all of it was added directly."""
        if leaf.grad is not None:
            self._add(leaf.grad)
        leaf.grad = None

    def add_product(self, grad_outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the gradient of a linear layer's weight, from (..., outputs) and the layer's inputs (..., inputs)."""
        left, right = grad_outputs.flatten(0, -2).T, inputs.flatten(0, -2)
        if right.shape[1] <= NARROW:
            self._add((right.T @ left.T).T)
        elif left.dtype != torch.float32:
            self._add(left @ right)
        else:
            torch.addmm(self.total, left, right, beta=1 if self.added else 0, out=self.total)
            self.added += 1

    def add_rows(self, rows: torch.Tensor, grad_rows: torch.Tensor) -> None:
        """Add the gradient of an embedding (rows, width): `grad_rows` (tokens, width) at its `rows` (tokens,)."""
        if not self.added:
            self.total.zero_()
        self.total.index_add_(0, rows, grad_rows.float())
        self.added += 1

    def _add(self, part: torch.Tensor) -> None:
        if self.added:
            self.total.add_(part)
        else:
            self.total.copy_(part)
        self.added += 1

    def write_gradient(self) -> None:
        """Give `weight` the sum as its gradient, in its own dtype: the sum itself, not a copy, where that is fp32."""
        if self.added:
            self.weight.grad = self.total.to(self.weight.dtype)


def _accumulator(weight: Any) -> GradAccumulator:
    return weight.grad_accumulator


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        computed = inputs.to(weight.dtype)
        ctx.make, sources = Recomputation.saved_or_recompute(inputs, computed)
        ctx.save_for_backward(weight, *sources)
        ctx.accumulator = _accumulator(weight)
        if bias is None:
            return F.linear(computed, weight)
        # F.linear would return a view, which the loss could not overwrite with its gradient.
        outputs = computed.new_empty(*computed.shape[:-1], len(weight))
        torch.addmm(bias, computed.flatten(0, -2), weight.T, out=outputs.view(-1, len(weight)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient] = gradients
        weight, *sources = ctx.saved_tensors
        ctx.accumulator.add_product(gradient, ctx.make(*sources).to(weight.dtype))
        grad_inputs = gradient @ weight if ctx.needs_input_grad[0] else None
        return grad_inputs, None, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.padding, ctx.accumulator = padding, _accumulator(weight)
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        [gradient] = gradients
        [rows] = ctx.saved_tensors
        trained = rows != (-1 if ctx.padding is None else ctx.padding)
        ctx.accumulator.add_rows(rows[trained], gradient[trained])
        return None, None, None


def _accumulating_forward(module: nn.Module) -> Callable | None:
    """The forward that adds to the weight's sum, for plain linear layers and embeddings."""
    if "forward" in vars(module):
        return None
    if type(module).forward is nn.Linear.forward:
        return lambda self, input: _Linear.apply(input, self.weight, self.bias)
    if type(module).forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return lambda self, input: _Embedding.apply(input, self.weight, self.padding_idx)
    return None


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return patches.map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs)
