"""One clear message for each mistake, for every registered name."""

import pytest
import torch
from torch import nn

from optim import registry
from optim.codec import Blocks
from optim.config_lowrank import TargetedConfig

NAMES = registry.names()
TARGETED = [name for name in NAMES if issubclass(registry.config_class(name), TargetedConfig)]


def named():
    return [("mlp.weight", nn.Parameter(torch.ones(8, 6))), ("embed.weight", nn.Parameter(torch.ones(5, 6)))]


def build(name, pairs=None, **options):
    return registry.build(registry.config_class(name)(**options), named() if pairs is None else pairs)


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_gradient_is_refused_by_name_before_anything_is_stepped(name):
    pairs = named()
    optimizer = build(name, pairs)
    (_, first), (_, second) = pairs
    first.grad = torch.ones_like(first)
    second.grad = torch.ones(5, 6).to_sparse()
    with pytest.raises(ValueError, match=r"needs dense gradients, but that of embed\.weight is torch\.sparse_coo"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:rank=")
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_in_two_groups_is_refused_by_name(name):
    pairs = named()
    optimizer = build(name, pairs)
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"mlp\.weight is in two groups.*leave it out of one"):
        optimizer.add_param_group({"params": [("again", pairs[0][1])]})
    assert len(optimizer.param_groups) == count


@pytest.mark.parametrize("name", ["adamw", "galore", "bnb_adamw_8bit"])
def test_a_parameter_twice_in_one_group_is_refused(name):
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="parameter 1 of group 0.*twice"):
        type(build(name))([p, p], lr=1e-3)


@pytest.mark.parametrize("name", TARGETED)
def test_a_rank_of_0_is_refused_by_the_config(name):
    (problem,) = registry.config_class(name)(rank=0).problems()
    assert problem.startswith("optim.rank=0: must be at least 1")


@pytest.mark.parametrize("name", TARGETED)
def test_a_rank_above_the_smaller_side_warns_and_takes_the_side(name):
    with pytest.warns(UserWarning, match=r"rank=7 exceeds the smaller side of 1 matrices, such as mlp\.weight"):
        optimizer = build(name, rank=7)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["basis"].shape[0] == 6


@pytest.mark.parametrize("name", TARGETED)
def test_targets_that_find_nothing_or_are_no_expression_are_refused(name):
    with pytest.raises(ValueError, match=r"optim\.targets='attn' finds none of the 2 .* mlp\.weight"):
        build(name, targets="attn")
    (problem,) = registry.config_class(name)(targets="(").problems()
    assert problem.startswith("optim.targets='(': not a regular expression")


@pytest.mark.parametrize("block", [0, 1, 100])
def test_a_block_that_is_no_power_of_two_is_refused(block):
    with pytest.raises(ValueError, match=f"block={block}: must be a power of two"):
        Blocks(bits=8, block=block)
