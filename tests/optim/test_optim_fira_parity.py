"""Step by step against fira 1.0.2, the authors' package."""

import pytest

from optim import Fira
from tests.optim.authors import assert_same_steps


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_authors_mode_follows_fira_for_20_steps_through_refreshes(proj_type, weight_decay):
    """reverse_std: its scale goes by the shape of R, which says the right thing for r below both sides."""
    theirs = pytest.importorskip("fira", reason="needs fira==1.0.2: pip install --no-deps fira==1.0.2").FiraAdamW
    common = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    assert_same_steps(
        lambda groups: Fira(groups, compat="authors", **common),
        lambda groups: theirs(groups, no_deprecation_warning=True, **common),
        {"rank": 6, "update_proj_gap": 8, "alpha": 0.25, "proj_type": proj_type},
    )
