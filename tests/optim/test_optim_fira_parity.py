"""Step by step against fira 1.0.2, the authors' package."""

import importlib.util

import pytest
import torch

from optim import Fira

SHAPES = [(32, 32), (16, 48), (48, 16), (37, 29), (29,), (50, 8)]
"""The last two without projection."""


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_authors_mode_follows_fira_for_20_steps_through_refreshes(proj_type, weight_decay):
    """reverse_std: its scale goes by the shape of R, which says the right thing for r below both sides."""
    if importlib.util.find_spec("fira") is None:
        pytest.skip("needs fira==1.0.2: pip install --no-deps fira==1.0.2")
    from fira import FiraAdamW

    ours, theirs = ([torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(SHAPES)] for _ in range(2))
    options = {"rank": 6, "update_proj_gap": 8, "alpha": 0.25, "proj_type": proj_type}

    def groups(params):
        return [{"params": params[4:]}, {"params": params[:4], **options}]

    common = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    first = Fira(groups(ours), compat="authors", **common)
    second = FiraAdamW(groups(theirs), no_deprecation_warning=True, **common)
    for step in range(20):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=1000 * (step + 1) + i)
            b.grad = a.grad.clone()
        first.step()
        second.step()
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), f"step {step + 1}, shape {tuple(a.shape)}"
