import pytest
import torch
from torch import nn

from optim import AdamW, GaLoreAdamW, registry
from optim.config import ApolloConfig, GaLoreConfig
from optim.describe import subspaces, uncoded


def stepped(cfg, steps):
    """Two matrices whose gradients have rank 1 and full rank."""
    named = [("mlp.a", nn.Parameter(torch.zeros(24, 16))), ("mlp.b", nn.Parameter(torch.zeros(16, 16)))]
    optimizer = registry.build(cfg, named)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        named[0][1].grad = torch.randn(24, 1, generator=generator) @ torch.randn(1, 16, generator=generator)
        named[1][1].grad = torch.randn(16, 16, generator=generator)
        optimizer.step()
    return optimizer


def fit(optimizer):
    return subspaces(optimizer.state.values())


def test_captured_energy_is_that_of_the_gradient_at_the_refresh():
    found = fit(stepped(GaLoreConfig(rank=2, targets="mlp", update_proj_gap=5), 3))
    generator = torch.Generator().manual_seed(0)
    torch.randn(24, 1, generator=generator), torch.randn(1, 16, generator=generator)
    grad = torch.randn(16, 16, generator=generator)
    energies = torch.linalg.svdvals(grad).square()
    optimal = float(energies[:2].sum() / energies.sum())
    assert found["captured"] == {"min": pytest.approx(optimal, rel=1e-4), "median": pytest.approx((1 + optimal) / 2)}
    assert found["refreshes"] == 2 and "overlap" not in found


def test_overlap_is_told_from_the_second_refresh_on():
    found = fit(stepped(GaLoreConfig(rank=2, targets="mlp", update_proj_gap=2), 3))
    assert found["refreshes"] == 4
    assert 0.0 <= found["overlap"]["min"] <= found["overlap"]["median"] <= 1.0


def test_a_random_basis_and_an_unprojected_optimizer_have_nothing_to_tell():
    assert fit(stepped(ApolloConfig(rank=2, targets="mlp"), 3)) is None
    assert fit(AdamW([nn.Parameter(torch.ones(3))])) is None


@pytest.mark.parametrize(
    ("build", "count", "held"),
    [
        (lambda named: AdamW(named, states="int8"), 2, 8 * (300 + 40)),
        (lambda named: AdamW(named, states="fp32"), 0, 0),
        (lambda named: registry.build(registry.config_class("bnb_adamw_8bit")(), named), 2, 8 * (300 + 40)),
        (lambda named: registry.build(registry.config_class("torchao_adamw_8bit")(), named), 2, 8 * (300 + 40)),
        (lambda named: GaLoreAdamW([{"params": named[:1], "rank": 4}, {"params": named[1:]}], states="int8"), 3, None),
    ],
    ids=["int8", "fp32", "bitsandbytes", "torchao", "GaLore of a rank below a block"],
)
def test_parameters_left_in_fp32_by_a_low_bit_codec_are_counted_with_their_bytes(build, count, held):
    shapes = {"matrix": (64, 128), "small": (10, 30), "vector": (40,)}
    optimizer = build([(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()])
    found = uncoded(optimizer)
    assert found.keys() == (shapes.keys() if count else set())
    assert sum(size > 0 for size in found.values()) == count
    if held is not None:
        assert sum(found.values()) == held
