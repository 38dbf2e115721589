"""Step by step against galore-torch 1.0, the authors' package."""

import pytest
import torch

from optim import GaLoreAdamW
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
