"""Step by step against apollo-torch 1.0.3, the authors' package (not for commercial use; only compared with)."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from optim import APOLLO

SHAPES = [(32, 32), (16, 48), (48, 16), (37, 29), (29,), (50, 8)]
"""The last two without projection."""


@pytest.fixture(scope="module")
def authors():
    """Their optimizer, without their `__init__`, which imports bitsandbytes for the 8-bit variants."""
    spec = importlib.util.find_spec("apollo_torch")
    if spec is None:
        pytest.skip("needs apollo-torch==1.0.3: pip install --no-deps apollo-torch==1.0.3")
    package = types.ModuleType("apollo_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["apollo_torch"] = package
    yield importlib.import_module("apollo_torch.apollo").AdamW
    for name in [name for name in sys.modules if name.split(".")[0] == "apollo_torch"]:
        del sys.modules[name]


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("kind", ["apollo", "mini"])
def test_authors_mode_follows_apollo_torch_for_20_steps_through_refreshes(authors, kind, proj, weight_decay):
    ours, theirs = ([torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(SHAPES)] for _ in range(2))
    own = {"rank": 6, "scale": 2.0, "scale_type": "channel"}
    if kind == "mini":
        own = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}
    options = {"update_proj_gap": 8, "proj_type": "std", "proj": proj, **own}

    def groups(params):
        return [{"params": params[4:]}, {"params": params[:4], **options}]

    common = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    first, second = APOLLO(groups(ours), compat="authors", **common), authors(groups(theirs), **common)
    for step in range(20):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=1000 * (step + 1) + i)
            b.grad = a.grad.clone()
        first.step()
        second.step()
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), f"step {step + 1}, shape {tuple(a.shape)}"
