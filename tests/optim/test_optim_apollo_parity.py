"""Step by step against apollo-torch 1.0.3, the authors' package (not for commercial use; only compared with)."""

import pytest

from optim import APOLLO, APOLLOAdamW
from tests.optim.authors import assert_same_steps, module_of


@pytest.fixture(scope="module")
def authors():
    for module in module_of("apollo_torch", "1.0.3", "apollo"):
        yield module.AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("kind", ["apollo", "mini"])
def test_authors_mode_follows_apollo_torch_for_20_steps_through_refreshes(authors, kind, proj, weight_decay):
    own = {"rank": 6, "scale": 2.0, "scale_type": "channel"}
    if kind == "mini":
        own = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}
    common = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    assert_same_steps(
        lambda groups: APOLLO(groups, compat="authors", **common),
        lambda groups: authors(groups, **common),
        {"update_proj_gap": 8, "proj_type": "std", "proj": proj, **own},
    )


def test_a_scale_before_the_limiter_is_one_after_it(authors):
    """So that their `scale_front` is taken, and ours is theirs with it."""
    common = {"lr": 1e-2, "betas": (0.9, 0.999), "scale_front": True}
    assert_same_steps(
        lambda groups: APOLLOAdamW(groups, compat="authors", no_deprecation_warning=True, **common),
        lambda groups: authors(groups, **common),
        {"rank": 1, "scale": 128.0, "scale_type": "tensor", "update_proj_gap": 8, "proj_type": "std", "proj": "random"},
    )
