"""Gradient clipping against PyTorch's, and the scale of the loss in fp16."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from sft_recipe.engine.optimization import LossScale, clip_grad_norm


@pytest.mark.parametrize("limit", [0.5, 100.0, math.inf])
def test_clipping_equals_torchs(limit):
    weights = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    for number, weight in enumerate(weights[:2]):
        weight.grad = torch.full_like(weight, number + 1.0)
    others = deepcopy(weights)
    for weight, other in zip(weights, others, strict=True):
        other.grad = None if weight.grad is None else weight.grad.clone()
    assert clip_grad_norm(weights, limit) == nn.utils.clip_grad_norm_(others, limit)
    assert all(torch.equal(weight.grad, other.grad) for weight, other in zip(weights[:2], others[:2], strict=True))


def test_loss_scale_follows_pytorchs_grad_scaler():
    ours, theirs = LossScale(is_needed=True), torch.amp.GradScaler("cpu", growth_interval=LossScale.GROWTH_INTERVAL)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step in range(2 * LossScale.GROWTH_INTERVAL):
        is_finite = step not in (0, 1, 450)
        theirs.scale(weight.sum() * (1.0 if is_finite else math.inf)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(is_finite)
        assert ours.value == theirs.get_scale(), step


def test_gradients_are_divided_by_the_loss_scale_and_others_are_left_alone():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    weights[0].grad = torch.full((2,), 2.0**17)
    LossScale(is_needed=True).unscale(weights)
    assert weights[0].grad.tolist() == [2.0, 2.0] and weights[1].grad is None
    scale = LossScale(is_needed=False)
    scale.update(is_finite=False)
    assert scale.value == 1
