"""Liger's kernels are chosen where they can run, and are given what they take; on a GPU they compute the same."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from offload import lean, liger


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package that looks like Liger's, whose kernels note what they are given; every tensor passes for CUDA's."""
    calls: list[Any] = []

    def norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
        calls.append(("norm", offset, casting_mode, in_place))
        return x + 1

    def product(name: str) -> Any:
        return lambda gate, up: calls.append(name) or gate

    modules = {
        "liger_kernel.ops.rms_norm": SimpleNamespace(LigerRMSNormFunction=SimpleNamespace(apply=norm)),
        "liger_kernel.ops.swiglu": SimpleNamespace(LigerSiLUMulFunction=SimpleNamespace(apply=product("silu"))),
        "liger_kernel.ops.geglu": SimpleNamespace(LigerGELUMulFunction=SimpleNamespace(apply=product("gelu_tanh"))),
    }
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(liger.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(liger, "takes", lambda *tensors: True)
    liger.function.cache_clear()
    yield calls  # type: ignore[misc]
    liger.function.cache_clear()


def test_kernels_are_given_the_modules_own_rounding_and_never_work_in_place(installed: list[Any]) -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert torch.equal(lean.rms_norm(x, weight, 1e-6), x + 1)
    lean.rms_norm(x, weight, 1e-6, True)
    lean.swiglu(x, x)
    lean.swiglu(x, x, "gelu_tanh")
    assert installed == [("norm", 0.0, "llama", False), ("norm", 1.0, "gemma", False), "silu", "gelu_tanh"]
    assert torch.equal(lean.swiglu(x, x, "gelu"), torch.nn.functional.gelu(x) * x), "Liger has no exact GELU"


def test_where_they_cannot_run_ours_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    assert not liger.takes(x)
    with FakeTensorMode():
        assert not liger.takes(torch.empty(2, 8))
    monkeypatch.setattr(liger, "takes", lambda *tensors: True)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    liger.function.cache_clear()
    assert liger.norm_kernel(x, x) is None and liger.gated_kernel(x, x, "silu") is None
    liger.function.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_on_a_gpu_they_compute_what_ours_do(dtype: torch.dtype, bound: float, plus_one: bool) -> None:
    """Forward and gradients, to rounding: sums run in another order."""
    pytest.importorskip("liger_kernel")
    made = torch.Generator("cuda").manual_seed(0)
    x, up = (torch.randn(64, 512, device="cuda", dtype=dtype, generator=made) for _ in range(2))
    weight = torch.rand(512, device="cuda", dtype=dtype, generator=made)
    kinds = ["silu", "gelu_tanh"]
    found = [outcome(lambda a, b: lean.rms_norm(a, b, 1e-6, plus_one), x, weight)]
    found += [outcome(lambda a, b, kind=kind: lean.swiglu(a, b, kind), x, up) for kind in kinds]
    assert liger.norm_kernel(x, weight) is not None
    ours = [outcome(lambda a, b: lean.RMSNorm.apply(a, b, 1e-6, plus_one), x, weight)]
    ours += [outcome(lambda a, b, kind=kind: lean.Gated.apply(a, b, kind), x, up) for kind in kinds]
    for one, other in zip(found, ours, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def outcome(function: Any, *given: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    out = function(*(leaf * 1 for leaf in leaves))  # not the leaves: kernels write over what they saved
    out.sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]
