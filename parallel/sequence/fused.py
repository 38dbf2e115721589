"""Linear attention by flash-linear-attention's Triton kernels, on CUDA where installed.

`chunk_simple_gla` has one decay a head or a token and head, which is what there is here; documents are its
`cu_seqlens`. It has as many keys as queries, so that shared ones are repeated. Results agree with ours to the rounding
of its tiles (TF32 or 16 bits). Written against flash-linear-attention 0.6; MIT licence.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from parallel.sequence.recurrence import Spans

Kernel = Callable[[Tensor, Tensor, Tensor, Spans], Tensor]
"""As `recurrence.attend` with a mask; differentiable."""


@functools.cache
def function() -> Callable[..., Any] | None:
    """fla's own; None where the package or the function is not there, or cannot be imported (it needs Triton)."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        return getattr(importlib.import_module("fla.ops.simple_gla"), "chunk_simple_gla", None)
    except (ImportError, RuntimeError):
        return None


def takes(*tensors: Tensor) -> bool:
    """Whether kernels can run on these: on CUDA, real ones, all of one dtype that Triton computes in."""
    dtypes = {tensor.dtype for tensor in tensors}
    real = all(tensor.is_cuda and not isinstance(tensor, FakeTensor) for tensor in tensors)
    return real and len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16, torch.float16}


def kernel_for(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Kernel | None:
    """What computes these faster than torch; None where nothing does."""
    return by_fla if causal and takes(q, k, v) and function() is not None else None


def by_fla(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Linear attention of documents that begin with a state of 0, in the dtype of q."""
    compute, share, decay = function(), q.shape[1] // k.shape[1], spans.decay
    assert compute is not None

    def laid(x: Tensor) -> Tensor:  # (batch, heads, tokens, ...) to (1, batch * tokens, heads, ...)
        x = x if x.shape[1] == q.shape[1] else x.repeat_interleave(share, 1)
        return x.transpose(1, 2).flatten(0, 1)[None].contiguous()

    how: dict[str, Tensor] = {}
    if decay is not None and decay.dim() == 1:
        how["g_gamma"] = decay.float().repeat_interleave(share)
    elif decay is not None:
        how["g"] = laid(decay.float())
    out = compute(laid(q), laid(k), laid(v), scale=1.0, cu_seqlens=borders_of(spans), **how)[0]
    found: Tensor = torch.unflatten(out[0], 0, spans.positions.shape).transpose(1, 2)
    return found


def borders_of(spans: Spans) -> Tensor:
    """Where documents begin in rows laid end to end, and the end, (documents + 1,) int64.

    Found once for all layers that are given the same positions, as it waits for the device.
    """
    known: Tensor | None = getattr(spans.positions, "borders", None)
    if known is None:
        begins = torch.ones_like(spans.document, dtype=torch.bool)
        begins[:, 1:] = spans.document[:, 1:] != spans.document[:, :-1]
        flat = begins.flatten()
        known = torch.cat([flat.nonzero()[:, 0], flat.new_tensor([len(flat)], dtype=torch.int64)])
        spans.positions.borders = known  # type: ignore[attr-defined]
    return known
