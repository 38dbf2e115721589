"""Liger's Triton kernels (Hsu et al. 2024, arXiv:2410.10989) for norms and gated products, on CUDA where installed.

They save what ours save (the input and a number a token; gate and up) in one pass over memory instead of several.
Results agree to rounding: sums run in another order. Written against liger-kernel 0.8.5.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Function = Callable[..., Tensor]
GATED = {"silu": ("swiglu", "LigerSiLUMulFunction"), "gelu_tanh": ("geglu", "LigerGELUMulFunction")}
"""Module and name in `liger_kernel.ops` of each activation times a factor."""


@functools.cache
def function(module: str, name: str) -> Function | None:
    """One of Liger's autograd functions; None where the package or the function is not there."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    found: Any = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name, None)
    return None if found is None else found.apply  # type: ignore[no-any-return]


def takes(*tensors: Tensor) -> bool:
    """Whether kernels can run on these: on CUDA, real ones, all of one dtype that Triton computes in."""
    dtypes = {tensor.dtype for tensor in tensors}
    real = all(tensor.is_cuda and not isinstance(tensor, FakeTensor) for tensor in tensors)
    return real and len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16, torch.float16}


def norm_kernel(x: Tensor, weight: Tensor) -> Function | None:
    """(x (..., h), weight (h,), eps, plus_one) to the norm; None where it has to be computed otherwise."""
    apply = function("rms_norm", "LigerRMSNormFunction") if takes(x, weight) else None
    if apply is None:
        return None

    def norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        # "llama" rounds before the weight and "gemma" after, as their modules do. Not in place: the gradient that
        # arrives is also the residual stream's.
        return apply(x, weight, eps, 1.0 if plus_one else 0.0, "gemma" if plus_one else "llama", False)

    return norm


def gated_kernel(gate: Tensor, up: Tensor, kind: str) -> Function | None:
    """(gate, up) (..., f) to their product after the activation `kind`; None where there is none.

    In backward Liger writes its results over gate and up, which nobody reads after it; a graph that is kept for a
    second backward is not for it.
    """
    return function(*GATED[kind]) if kind in GATED and takes(gate, up) else None
