"""Gradient clipping on a single rank, and the scale of the loss in fp16."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients of a single rank to a norm of at most `limit`; returns the norm before.

    As torch.nn.utils.clip_grad_norm_, without the time that DTensor takes to plan how shards would be combined.
    """
    gradients = [
        gradient.to_local() if isinstance(gradient, DTensor) else gradient
        for gradient in (parameter.grad for parameter in parameters)
        if gradient is not None
    ]
    norm = torch.nn.utils.get_total_norm(gradients)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


class LossScale:
    """The factor of the loss that keeps gradients within the range of fp16.

    Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2: halved after a step with a gradient that is
    not finite, doubled after GROWTH_INTERVAL steps without. The norm that decides is the same on all ranks, and so the
    scale is. In other dtypes it stays 1.
    """

    GROWTH_INTERVAL = 400
    RANGE = 1.0, 2.0**24

    def __init__(self, is_needed: bool):
        self.is_needed = is_needed
        self.value = 2.0**16 if is_needed else 1.0
        self.good_steps = 0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide all gradients by the scale."""
        if self.value != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.value)

    def update(self, is_finite: bool) -> None:
        """Adapt the scale after a step."""
        if not self.is_needed:
            return
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite or self.good_steps == self.GROWTH_INTERVAL:
            smallest, largest = self.RANGE
            self.value = min(max(self.value * (2.0 if is_finite else 0.5), smallest), largest)
            self.good_steps = 0
