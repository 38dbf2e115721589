"""Steps of tensors on CUDA in one kernel each, where torch's operators take one for every pass over the values.

Of torch's own there is a fused AdamW for states as they are; those that are coded, weights that are narrower than the
math, draws of stochastic rounding and scaled gradients have theirs in `kernels.py`, in Triton, which torch brings
along. Without Triton, and for tensors that are not contiguous, torch's operators do the same.
"""

import functools
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optim.base import State, is_pretended
from optim.codebook import book
from optim.codec import CODECS, EXPANSION_RANGE, Blocks, Codec, Expanded, roots
from optim.rounding import Stochastic, Store, int32

VALUES = 1024
"""Values that a program takes."""
WARPS = 8
"""Of 32 threads, for a program that codes."""
NO_DRAWS = (0, 0, 0)
FLAT = 1024
"""Length of a block of a state that has none."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_on = True


@contextmanager
def eager() -> Iterator[None]:
    """Leave the kernels out inside, so that either way can be measured and held against the other."""
    global _on
    was, _on = _on, False
    try:
        yield
    finally:
        _on = was


def usable(*tensors: Tensor) -> bool:
    """Whether these tensors are where the kernels run, laid out as they walk memory, and of floats that they read."""
    there = _has_triton() or is_pretended(tensors[0])
    return _on and there and all(x.is_cuda and x.dtype in FLOATS and _is_plain(x) for x in tensors)


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous() and not is_traceable_wrapper_subclass(x)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Draws(Stochastic):
    """Stochastic rounding by one kernel where there is one."""

    def __call__(self, target: Tensor, wide: Tensor) -> None:
        if self.pitch is None and usable(target, wide) and target.dtype is torch.bfloat16:
            round_bf16_(target, wide, self)
        else:
            super().__call__(target, wide)

    def numbers(self, target: Tensor) -> tuple[int, int, int]:
        """What the kernels take for some rows, as int32."""
        return int32(self.first_of(target)), int32(self.seed), int32(self.seed >> 32)


def writes(store: Store) -> bool:
    """Whether the kernels can write a weight in this way."""
    return store is Tensor.copy_ or (isinstance(store, Draws) and store.pitch is None)


def _draws(store: Store, target: Tensor) -> tuple[int, int, int] | None:
    return store.numbers(target) if isinstance(store, Draws) else None


@dataclass(frozen=True)
class Rates:
    """Numbers of a step of AdamW: W <- after (decay W - size m / (sqrt(v) / root + eps))."""

    betas: tuple[float, float]
    size: float
    root: float
    eps: float
    decay: float
    after: float

    @classmethod
    def of(
        cls, step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        authors: bool = False, raw: bool = False,
    ) -> "Rates":  # fmt: skip
        """As `optim.adam.adamw_update_` takes them."""
        root = math.sqrt(1.0 - betas[1] ** step)
        if raw:
            size, eps, root = lr, eps if authors else eps * root, 1.0
        else:
            size, eps = lr / (1.0 - betas[0] ** step), eps / root if authors else eps
        kept = 1.0 - lr * weight_decay
        return cls(betas, size, root, eps, 1.0 if authors else kept, kept if authors else 1.0)


def adamw_(
    weight: Tensor, grad: Tensor, state: State, codec: Codec, rates: Rates,
    *, store: Store = Tensor.copy_, fresh: bool = False,
) -> None:  # fmt: skip
    """Step contiguous tensors and the state of `codec`, all in place.

    Args:
        store: how a narrower weight is rounded, one that `writes` knows.
        fresh: the weight stands for zeros: it is written, in its own dtype, and not read.
    """
    if is_pretended(weight) or not weight.numel():
        return  # nothing is allocated
    from optim import kernels

    moments = [_moment(state, key, codec, signed) for key, signed in (("exp_avg", True), ("exp_avg_sq", False))]
    tables = [table for moment in moments for table in moment[3:]]
    width, size, tiles = weight.numel(), FLAT, VALUES // FLAT
    if isinstance(codec, Blocks):
        width, size, tiles = weight.numel() // weight.shape[0], codec.block, VALUES // codec.block
    draws = _draws(store, weight)
    blocks = -(-width // size)
    count = weight.numel() // width * blocks
    beta1, beta2 = rates.betas
    kernels.adamw[(-(-count // tiles),)](
        weight, grad, *moments[0][:3], *moments[1][:3], *tables,
        width, blocks, count, *(draws or NO_DRAWS),
        beta1, 1.0 - beta1, beta2, 1.0 - beta2, rates.size, rates.root, rates.eps, rates.decay, rates.after,
        CODEC=KINDS[codec], WRITE=2 if fresh else int(draws is not None), EXPANSION=EXPANSION_RANGE,
        TILES=tiles, SIZE=size, num_warps=WARPS,
    )  # fmt: skip


KINDS = {codec: kind for kind, codec in enumerate(CODECS[name] for name in ("fp32", "bf16", "int8", "int4", "fp8"))}


def _moment(state: State, key: str, codec: Codec, signed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, powers, the table that codes are read by and the one that they are found by; what a codec does
    not have is the codes, which nothing looks at."""
    codes = state[key]
    if not isinstance(codec, Blocks):
        return (codes,) * 5
    scale = state[key + "_scale"]
    if isinstance(codec, Expanded):
        return codes, scale, state[key + "_power"], roots(codes), codes
    found = book(codec.bits, signed, codes)
    return codes, scale, codes, found.values, found.cells


def scaled_add_(weight: Tensor, grad: Tensor, factor: Tensor, *, beta: float, store: Store = Tensor.copy_) -> None:
    """W <- beta W + G s in place, for contiguous matrices; s is (m, 1), (1, n) or (1, 1), fp32."""
    if is_pretended(weight) or not weight.numel():
        return
    from optim import kernels

    draws, (rows, width) = _draws(store, weight), weight.shape
    by_row = factor.shape[0] == rows and factor.numel() > 1
    kernels.scaled_add[(-(-weight.numel() // VALUES),)](
        weight, grad, factor.contiguous(), width, weight.numel(), *(draws or NO_DRAWS), beta,
        BY_ROW=by_row, BY_COLUMN=not by_row and factor.numel() > 1, WRITE=int(draws is not None), SIZE=VALUES,
    )  # fmt: skip


def round_bf16_(target: Tensor, wide: Tensor, draws: Draws) -> None:
    """Write contiguous fp32 values into a contiguous bf16 tensor, with the draws of `optim.rounding.stochastic`."""
    if is_pretended(target) or not target.numel():
        return
    from optim import kernels

    kernels.round_bf16[(-(-target.numel() // VALUES),)](
        target, wide, target.numel(), *draws.numbers(target), SIZE=VALUES
    )  # fmt: skip
