"""A linear map and its LoRA adapter in one, where one CPU rank holds the model whole.

    y = x W' + bias + scale (x A') B'            Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1

peft computes the second term by itself, scales it and adds it: three more passes over y, and two over the gradient.
Here both products add to what is there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn

from sft_recipe.engine.cpu.recompute import Recomputation


def adapted_forward(module: nn.Module) -> Callable | None:
    """For a linear map with one adapter of the usual kind; its weights must have their `grad_accumulator`."""
    if type(module) is not lora.Linear or "forward" in vars(module) or len(module.lora_A) != 1:
        return None
    [name], base = module.lora_A, module.base_layer
    is_plain = (
        type(base) is nn.Linear
        and "forward" not in vars(base)
        and not any(part.requires_grad for part in base.parameters())
    )
    is_usual = name not in module.lora_variant and isinstance(module.lora_dropout[name], nn.Identity)
    has_biases = module.lora_A[name].bias is not None or module.lora_B[name].bias is not None
    return _forward if is_plain and is_usual and not has_biases else None


def _forward(self: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    [name], base = self.lora_A, self.base_layer
    if more or named or self.disable_adapters or self.merged or self.active_adapters != [name]:
        return type(self).forward(self, x, *more, **named)
    down, up = self.lora_A[name].weight, self.lora_B[name].weight
    return _Adapted.apply(x, base.weight, base.bias, down, up, self.scaling[name])


class _Adapted(torch.autograd.Function):
    """inputs (..., width), weight (outputs, width), down (rank, width), up (outputs, rank)."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        computed = inputs.to(weight.dtype)
        ctx.make, sources = Recomputation.saved_or_recompute(inputs, computed)
        result, narrow = F.linear(computed, weight, bias), F.linear(computed, down)
        result.view(-1, len(weight)).addmm_(narrow.flatten(0, -2), up.T, alpha=scale)
        ctx.save_for_backward(weight, down, up, narrow, *sources)
        ctx.scale, ctx.sums = scale, (down.grad_accumulator, up.grad_accumulator)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [gradient] = gradients
        weight, down, up, narrow, *sources = ctx.saved_tensors
        of_down, of_up = ctx.sums
        of_narrow = F.linear(gradient, up.T.contiguous()).mul_(ctx.scale)  # with few columns faster than gradient @ up
        of_up.add_product(gradient, narrow * ctx.scale)
        of_down.add_product(of_narrow, ctx.make(*sources).to(weight.dtype))
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ weight
            of_inputs.view(-1, weight.shape[1]).addmm_(of_narrow.flatten(0, -2), down)
        return of_inputs, None, None, None, None, None
