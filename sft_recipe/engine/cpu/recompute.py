"""RMSNorm and the product of a gated MLP on CPUs, which save only their inputs for the backward pass.

The backward pass computes the rest again, as in Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.1). Autograd
would save two more tensors of a norm, one of them in fp32, and one of a product. Layers that would save the outputs of
these can compute them again too; see `Recomputation`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from sft_recipe.engine.patches import changes_in_place

BLOCK = 2**18  # elements of a norm at a time, so that intermediate results stay in a core's cache
MLP = ("gate_proj", "up_proj", "down_proj")


def recompute_norms_and_mlps(model: nn.Module) -> None:
    """Change all RMSNorms and gated MLPs of `model` that are of the usual kind; others stay as they are.

    A module is of the usual kind if its class's forward gives, bit for bit and for large and small numbers, what is
    computed here.
    """
    for module in model.modules():
        if _is_standard_norm(module):
            module.forward = MethodType(_norm, module)  # type: ignore[method-assign]
        elif _is_standard_mlp(module):
            module.forward = MethodType(_mlp, module)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Recomputation:
    """Computes a tensor again, bit for bit, from `sources`, which another backward pass saves anyway."""

    make: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]
    version: int  # number of changes in place when this was made: a tensor that changed later cannot be made again

    @staticmethod
    def of(tensor: torch.Tensor) -> "Recomputation | None":
        """The recomputation of a tensor, where there is one and the tensor has not changed."""
        recipe = getattr(tensor, "recipe", None)
        return recipe if recipe and recipe.version == changes_in_place(tensor) else None

    @staticmethod
    def saved_or_recompute(
        tensor: torch.Tensor, computed: torch.Tensor
    ) -> tuple[Callable[..., torch.Tensor], Sequence[torch.Tensor]]:
        """A function that returns `tensor` in a backward pass, and the tensors to save for it.

        Without a recomputation that is `computed`: the tensor in the dtype that it is used in.
        """
        recipe = Recomputation.of(tensor)
        return (recipe.make, recipe.sources) if recipe else (_identity, (computed,))


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Memo:
    """A function of tensors that keeps its result until `forget` is called."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.result: torch.Tensor | None = None

    def __call__(self, *sources: torch.Tensor) -> torch.Tensor:
        if self.result is None:
            self.result = self.function(*sources)
        return self.result

    def forget(self) -> None:
        self.result = None


def _norm(self: Any, hidden_states: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    # Some norms also take a gate; and a weight of another dtype would change that of the product.
    if more or named or hidden_states.dtype != self.weight.dtype:
        return type(self).forward(self, hidden_states, *more, **named)
    again = _Memo(_normed)
    result, scale = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, again.forget)
    result.recipe = Recomputation(again, (hidden_states, self.weight, scale), changes_in_place(result))
    return result


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    product = _GatedProduct.apply(gate, up, self.act_fn)
    product.recipe = Recomputation(partial(_product, self.act_fn), (gate, up), changes_in_place(product))
    return self.down_proj(product)


def _is_standard_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or not hasattr(module, "variance_epsilon"):
        return False
    example = SimpleNamespace(weight=_random(len(weight)).bfloat16(), variance_epsilon=module.variance_epsilon)
    return _is_same(type(module).forward, _norm, example, len(weight))


def _is_standard_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if not {*MLP, "act_fn"} <= set(children) or next(children["act_fn"].parameters(), None) is not None:
        return False
    parts: dict[str, Any] = {name: (lambda x, by=by: x * by) for by, name in enumerate(MLP, start=2)}
    return _is_same(type(module).forward, _mlp, SimpleNamespace(**parts, act_fn=children["act_fn"]), 64)


def _is_same(forward: Callable, replacement: Callable, example: Any, width: int) -> bool:
    """Whether both give the same for a module that looks like `example`, for inputs (..., width)."""
    sizes = torch.logspace(-5, 2, 64)[:, None]  # of a row's elements
    x = (_random(64, width) * sizes).bfloat16()[None]
    try:
        return torch.equal(forward(example, x), replacement(example, x))
    except Exception:  # it needs other attributes or inputs than the usual kind
        return False


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, in fp32 up to the product with the weight.

    Returns that and 1 / sqrt(...), (rows, 1). `before_backward` is called when the gradient of the first is complete.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, before_backward: Callable[[], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.empty(x.numel() // x.shape[-1], 1, dtype=torch.float32)
        for rows, source in _blocks(x):
            torch.rsqrt(source.float().pow(2).mean(-1, keepdim=True).add_(epsilon), out=scale[rows])
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.before_backward = before_backward
        return _normed(x, weight, scale), scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # With n = x * scale: dx = scale * (g * w - n * mean(g * w * n)), dw = sum over rows of g * n.
        ctx.before_backward()
        gradient, _ = gradients
        x, weight, scale = ctx.saved_tensors
        wide_weight, grad_weight = weight.float(), torch.zeros(len(weight))
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, source, upstream, target in _blocks(x, gradient, grad_x):
            normed, wide = source.float() * scale[rows], upstream.to(torch.float32, copy=True)
            product = wide * normed
            if ctx.needs_input_grad[1]:
                grad_weight += product.sum(0)
            mean = torch.mv(product, wide_weight).div_(len(weight))[:, None]
            target.copy_(wide.mul_(wide_weight).addcmul_(normed, mean, value=-1).mul_(scale[rows]))
        return grad_x, grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None


def _normed(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows, source, target in _blocks(x, result):
        torch.mul((source.float() * scale[rows]).to(x.dtype), weight, out=target)
    return result


class _GatedProduct(torch.autograd.Function):
    """activation(gate) * up, elementwise."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Callable) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _product(activation, gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient] = gradients
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        [grad_gate] = torch.autograd.grad(activated, leaf, gradient * up)
        return grad_gate, activated.detach() * gradient, None


def _product(activation: Callable, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Blocks of rows of tensors of the same shape (..., width): a slice, and the rows (rows, width) of each."""
    width = tensors[0].shape[-1]
    flat = [tensor.reshape(-1, width) for tensor in tensors]  # a view of a tensor that is written to: it is contiguous
    step = max(1, BLOCK // width)
    for start in range(0, len(flat[0]), step):
        rows = slice(start, start + step)
        yield rows, *(tensor[rows] for tensor in flat)
