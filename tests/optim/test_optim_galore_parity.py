"""Step by step against galore-torch 1.0, the authors' package."""

import pytest
import torch

from optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from tests.optim.authors import assert_same_steps, module_of, randn

PROJ_TYPES = ["std", "reverse_std", "left", "right"]


@pytest.fixture(scope="module")
def authors():
    for module in module_of("galore_torch", "1.0", "adamw"):
        yield module.AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_authors_mode_follows_galore_torch_for_20_steps_through_a_refresh(authors, proj_type, weight_decay):
    common = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    assert_same_steps(
        lambda groups: GaLoreAdamW(groups, compat="authors", **common),
        lambda groups: authors(groups, no_deprecation_warning=True, **common),
        {"rank": 6, "update_proj_gap": 8, "scale": 0.25, "proj_type": proj_type},
    )


@pytest.fixture(scope="module")
def authors_adafactor():
    for module in module_of("galore_torch", "1.0", "adafactor"):
        yield module.Adafactor


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_their_adafactor_is_followed_for_20_steps_through_refreshes(authors_adafactor, proj_type, beta1, weight_decay):
    common = {"lr": 1e-2, "beta1": beta1, "weight_decay": weight_decay, "scale_parameter": False,
              "relative_step": False}  # fmt: skip
    assert_same_steps(
        lambda groups: GaLoreAdafactor(groups, compat="authors", **common),
        lambda groups: authors_adafactor(groups, **common),
        {"rank": 6, "update_proj_gap": 8, "scale": 0.25, "proj_type": proj_type},
    )


def test_what_their_scripts_never_ask_of_adafactor_is_refused():
    params = [torch.nn.Parameter(torch.zeros(4, 4))]
    with pytest.raises(ValueError, match="takes a learning rate: give lr, scale_parameter=False"):
        GaLoreAdafactor(params)
    with pytest.raises(ValueError, match="the first must be 1e-30"):
        GaLoreAdafactor(params, lr=1e-3, eps=(1e-8, 1e-3), scale_parameter=False, relative_step=False)
    with pytest.raises(ValueError, match="correct_bias=False"):
        GaLoreAdamW(params, correct_bias=False)


def test_the_8_bit_class_keeps_its_moments_in_8_bits():
    p = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = GaLoreAdamW8bit([{"params": [p], "rank": 64, "scale": 0.25}], lr=1e-3)
    assert optimizer.state[p]["exp_avg"].dtype is torch.uint8 and optimizer.param_groups[0]["weight_decay"] == 1e-2


def test_the_default_differs_from_the_authors_by_eps_alone_while_eps_matters(authors):
    """Guards the claim above: without compat the placement of eps shows in the first steps."""
    moved = []
    for build in (
        lambda p: GaLoreAdamW([{"params": [p], "rank": 4}], lr=1e-2, eps=1e-2, refresh="svd"),
        lambda p: GaLoreAdamW([{"params": [p], "rank": 4}], lr=1e-2, eps=1e-2, compat="authors"),
        lambda p: authors(
            [{"params": [p], "rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}],
            lr=1e-2,
            eps=1e-2,
            no_deprecation_warning=True,
        ),
    ):
        p = torch.nn.Parameter(torch.zeros(20, 12))
        p.grad = randn(20, 12, seed=3)
        build(p).step()
        moved.append(p.detach())
    assert (moved[1] - moved[2]).norm() <= 1e-6 * moved[2].norm()
    assert (moved[0] - moved[2]).norm() >= 1e-2 * moved[2].norm()
