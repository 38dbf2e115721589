"""How far last digits of gradients move weights, in exact arithmetic: what no order of sums can take away.

Shards and micro-batches sum a gradient in another order, and so in other last digits. In fp64, where the optimizer's
own rounding is nothing, a relative error of 2^-24 in each gradient is all that is left of that: what it makes of the
weights after 20 steps is how sensitive a method is. AdamW is 1. COSMOS, which brings all singular values of the rest
near one, the smallest too, is 6; SGD at this rate, whose weights go twice as far as they are large, 6; one scale for a
whole matrix (APOLLO-Mini) 1.2; all others less than AdamW.
"""

import math

import pytest
import torch

from optim import registry
from tests.optim.sharded import config
from tests.optim.test_optim_sharded import _Model

SEEDS = 3


def trained(name, seed, noise):
    torch.manual_seed(3)
    model = _Model().double()
    optimizer = registry.build(config(name), model.named_parameters())
    draws = torch.Generator().manual_seed(77)
    for step in range(20):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x, y = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
        (model(x) - y).square().sum().backward()
        for p in model.parameters():
            size = noise * p.grad.norm() / p.grad.numel() ** 0.5
            p.grad.add_(torch.randn(p.grad.shape, generator=draws, dtype=torch.float64) * size)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def sensitivity(name):
    """Mean of the drift, of the size of the weights, over that of AdamW."""
    drifts = {}
    for each in (name, "adamw"):
        logs = []
        for seed in range(SEEDS):
            exact = trained(each, seed, 0.0)
            logs.append(math.log(float((trained(each, seed, 2.0**-24) - exact).norm() / exact.norm())))
        drifts[each] = sum(logs) / SEEDS
    return math.exp(drifts[name] - drifts["adamw"])


@pytest.mark.parametrize("name", ["adafactor", "galore", "galore_adafactor", "apollo", "fira"])
def test_last_digits_of_gradients_move_these_no_further_than_adamw(name):
    assert sensitivity(name) < 1.0


@pytest.mark.parametrize(("name", "least", "most"), [("apollo_mini", 0.9, 1.5), ("cosmos", 4, 9), ("sgd", 4, 10)])
def test_and_these_further_in_exact_arithmetic(name, least, most):
    assert least < sensitivity(name) < most
