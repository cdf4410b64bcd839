"""The learning-rate schedule, and gradient clipping on a single rank."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def schedule(step: int, total: int, warmup: int, kind: str, min_ratio: float) -> float:
    """Return the learning rate at optimizer step `step` (from 0), as a fraction of its peak.

    Rises linearly over `warmup` steps, the first of them above 0; then constant, linear, or half a cosine
    (https://arxiv.org/abs/1608.03983, without restarts) down to `min_ratio`, which it would reach at step `total`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]
    return factor if kind == "constant" else min_ratio + (1.0 - min_ratio) * factor


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
