"""What the step-by-step comparisons with the authors' packages share."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

SHAPES = [(32, 32), (16, 48), (48, 16), (37, 29), (29,), (50, 8)]
"""The last two without projection."""


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module_of(package, version, module):
    """Yield a module of theirs without their `__init__`, which imports bitsandbytes for the 8-bit variants."""
    if package in sys.modules:  # another module of theirs is being compared with
        yield importlib.import_module(f"{package}.{module}")
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = f"{package.replace('_', '-')}=={version}"
        pytest.skip(f"needs {name}: pip install --no-deps {name}")
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = bare
    yield importlib.import_module(f"{package}.{module}")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def steps(first, second, ours, theirs, count=20):
    """Step both optimizers by the same gradients; yield the number of each step taken."""
    for step in range(1, count + 1):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=1000 * step + i)
            b.grad = a.grad.clone()
        first.step()
        second.step()
        yield step


def assert_same_steps(build, build_theirs, options):
    """Both built from groups, the second with `options` for projection, take 20 steps to the same weights."""
    ours, theirs = ([torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(SHAPES)] for _ in range(2))
    first, second = (
        of([{"params": params[4:]}, {"params": params[:4], **options}])
        for of, params in ((build, ours), (build_theirs, theirs))
    )
    for step in steps(first, second, ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), f"step {step}, shape {tuple(a.shape)}"
