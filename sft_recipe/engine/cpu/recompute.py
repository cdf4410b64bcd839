"""RMSNorm and the product of a gated MLP on CPUs, which keep their inputs only for the backward.

That computes the rest again, as in Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.1). Autograd would keep
two further tensors of a norm, one of them in fp32, and one of a product. Their results can be made again too, by those
who would keep them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

BLOCK = 2**18  # numbers of a norm at a time: what is computed on the way stays in a core's cache
MLP = ("gate_proj", "up_proj", "down_proj")


def recompute_norms_and_mlps(model: nn.Module) -> None:
    """Change all norms and gated MLPs of `model` that are of the usual kind; others stay as they are.

    Which are is tried: their class must give, bit for bit and for large and small numbers, what is computed here.
    """
    for module in model.modules():
        if _is_standard_norm(module):
            module.forward = MethodType(_norm, module)
        elif _is_standard_mlp(module):
            module.forward = MethodType(_mlp, module)


@dataclass(frozen=True)
class Recomputation:
    """How a tensor is made again, bit for bit, from `sources`, which another backward keeps anyway."""

    make: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]
    version: int  # of the tensor: it is another when that has been changed in place

    @staticmethod
    def of(tensor: torch.Tensor) -> "Recomputation | None":
        found = getattr(tensor, "recipe", None)
        return found if found and found.version == tensor._version else None

    @staticmethod
    def saved_or_recompute(
        tensor: torch.Tensor, computed: torch.Tensor
    ) -> tuple[Callable[..., torch.Tensor], Sequence[torch.Tensor]]:
        """What makes a tensor in a backward, and from what; where it has no recipe, `computed` is kept."""
        recipe = Recomputation.of(tensor)
        return (recipe.make, recipe.sources) if recipe else (_itself, (computed,))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Memo:
    """A function of tensors that keeps its result, for others who ask, until it is told to forget it."""

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
    # Some norms may be given a gate as well; and a weight of another width would widen the product.
    if more or named or hidden_states.dtype != self.weight.dtype:
        return type(self).forward(self, hidden_states, *more, **named)
    again = _Memo(_normed)
    result, scale = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, again.forget)
    result.recipe = Recomputation(again, (hidden_states, self.weight, scale), result._version)
    return result


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    product = _GatedProduct.apply(gate, up, self.act_fn)
    product.recipe = Recomputation(partial(_product, self.act_fn), (gate, up), product._version)
    return self.down_proj(product)


def _is_standard_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if len(module._parameters) != 1 or weight is None or weight.dim() != 1 or not hasattr(module, "variance_epsilon"):
        return False
    alike = SimpleNamespace(weight=_numbers(len(weight)).bfloat16(), variance_epsilon=module.variance_epsilon)
    return _is_same(type(module).forward, _norm, alike, len(weight))


def _is_standard_mlp(module: nn.Module) -> bool:
    if not {*MLP, "act_fn"} <= set(module._modules) or next(module.act_fn.parameters(), None) is not None:
        return False
    parts: dict[str, Any] = {name: (lambda x, by=by: x * by) for by, name in enumerate(MLP, start=2)}
    return _is_same(type(module).forward, _mlp, SimpleNamespace(**parts, act_fn=module.act_fn), 64)


def _is_same(one: Callable, other: Callable, alike: Any, width: int) -> bool:
    sizes = torch.logspace(-5, 2, 64)[:, None]  # of a row's numbers
    x = (_numbers(64, width) * sizes).bfloat16()[None]
    try:
        return torch.equal(one(alike, x), other(alike, x))
    except Exception:  # it wants more of its module, or of what it is given, than the usual kind
        return False


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, in fp32 up to the product with the weight.

    Returns that and 1 / sqrt(...), (rows, 1); `before_backward` is called when all gradients of the former are there.
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
        wide_weight, of_weight = weight.float(), torch.zeros(len(weight))
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, source, upstream, target in _blocks(x, gradient, of_x):
            normed, wide = source.float() * scale[rows], upstream.to(torch.float32, copy=True)
            product = wide * normed
            if ctx.needs_input_grad[1]:
                of_weight += product.sum(0)
            mean = torch.mv(product, wide_weight).div_(len(weight))[:, None]
            target.copy_(wide.mul_(wide_weight).addcmul_(normed, mean, value=-1).mul_(scale[rows]))
        return of_x, of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None


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
        [of_gate] = torch.autograd.grad(activated, leaf, gradient * up)
        return of_gate, activated.detach() * gradient, None


def _product(activation: Callable, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """The same rows of tensors of one shape (..., width), as a slice and as parts (rows, width) of each."""
    width = tensors[0].shape[-1]
    flat = [tensor.reshape(-1, width) for tensor in tensors]  # a view of what is written to: that is contiguous
    step = max(1, BLOCK // width)
    for start in range(0, len(flat[0]), step):
        rows = slice(start, start + step)
        yield rows, *(tensor[rows] for tensor in flat)
