"""Step by step against galore-torch 1.0, the authors' package."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from optim import GaLoreAdamW

SHAPES = [(32, 32), (16, 48), (48, 16), (37, 29)]
PROJ_TYPES = ["std", "reverse_std", "left", "right"]


@pytest.fixture(scope="module")
def authors():
    """Their AdamW, without their `__init__`, which imports bitsandbytes for the 8-bit variant."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("needs galore-torch==1.0: pip install --no-deps galore-torch==1.0")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["galore_torch"] = package
    yield importlib.import_module("galore_torch.adamw").AdamW
    for name in [name for name in sys.modules if name.split(".")[0] == "galore_torch"]:
        del sys.modules[name]


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_authors_mode_follows_galore_torch_for_20_steps_through_a_refresh(authors, proj_type, weight_decay):
    shapes = [*SHAPES, (29,), (50, 8)]  # the last two without projection
    ours, theirs = ([torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)] for _ in range(2))
    options = {"rank": 6, "update_proj_gap": 8, "scale": 0.25, "proj_type": proj_type}

    def groups(params):
        return [{"params": params[4:]}, {"params": params[:4], **options}]

    common = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    first = GaLoreAdamW(groups(ours), compat="authors", **common)
    second = authors(groups(theirs), no_deprecation_warning=True, **common)
    for step in range(20):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=1000 * (step + 1) + i)
            b.grad = a.grad.clone()
        first.step()
        second.step()
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), f"step {step + 1}, shape {tuple(a.shape)}"


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
