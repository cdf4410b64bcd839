"""The learning-rate schedule and gradient clipping against PyTorch's and transformers'."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from sft_recipe.engine.optimization import clip_grad_norm, schedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_rises_in_the_warmup_and_falls_to_the_minimum(kind):
    rates = [schedule(step, 100, 10, kind, 0.1) for step in range(101)]
    assert rates[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    expected = {"constant": (1.0, 1.0), "linear": (0.55, 0.1), "cosine": (0.55, 0.1)}[kind]
    assert (rates[55], rates[100]) == pytest.approx(expected)
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    assert schedule(0, 1, 0, kind, 0.0) == 1.0


def test_cosine_equals_transformers_after_the_warmup():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    [reference] = get_cosine_schedule_with_warmup(optimizer, 10, 100).lr_lambdas
    for step in range(10, 100):
        assert schedule(step, 100, 10, "cosine", 0.0) == pytest.approx(reference(step))


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
