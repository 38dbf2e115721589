"""Adafactor: the second moment of a matrix kept as row and column means.

For W (out, in) with gradient G, b2 = 1 - t^-decay_rate:
    r <- b2 r + (1 - b2) mean(G*G + 1e-30, in)     (out, 1) fp32
    c <- b2 c + (1 - b2) mean(G*G + 1e-30, out)    (1, in)  fp32
    U  = G / sqrt(r c / mean(r));  U <- lr U / max(1, rms(U) / clip_threshold)
    M <- b1 M + (1 - b1) U  where beta1 is not 0   as W; it holds the learning rate, as in the authors' code
    W <- (1 - lr wd) W - M  (or U)
State: 4 (out + in) bytes per matrix, and 4 per value for M (less with a codec); vectors keep a full second moment.
In a projected group the same is done to R (GaLore-Adafactor), whose step comes back times `scale`.
Paper: Shazeer, Stern 2018, arXiv:1804.04235, algorithm 4. Left out: relative steps, scaling by the weight's RMS.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optim.base import Group, State, state_dtype
from optim.codec import codec_for
from optim.compose import ComposedOptimizer
from optim.rules import Moment, Rule, Stepped
from optim.sharded import Job, Sums, new_tensors, together
from parallel.dtensor import Layout

DEAD = 1e-30
"""Added to squares: a dead row would divide by zero (eps1 of the paper)."""


def adafactor_direction(
    grad: Tensor, second: Sequence[Tensor], layout: Layout, *, step: int, decay_rate: float, clip_threshold: float
) -> Sums:
    """Return U before the learning rate; asks for sums over ranks where the tensor is sharded.

    Args:
        grad: this rank's part of a tensor of `layout`.
        second: updated in place; (row, col) for two dims and more, or (v,) for less.
    """
    fresh = step**-decay_rate
    squares = grad.square().add_(DEAD)
    if len(second) == 2:
        row, col = second
        rows, cols = yield from _means(squares, layout)
        row.lerp_(rows, fresh)
        col.lerp_(cols, fresh)
        # Both means follow the mean of all squares; the one that is whole on this rank needs no sum.
        level = col.mean(-1, keepdim=True) if layout.dim == grad.dim() - 2 else row.mean(-2, keepdim=True)
        update = grad * (row / level).rsqrt_() * col.rsqrt()
    else:
        second[0].lerp_(squares, fresh)
        update = grad * second[0].rsqrt()
    norm = torch.linalg.vector_norm(update)
    if not layout.whole:
        norm = (yield norm.square_()).sqrt_()
    rms = norm / math.sqrt(max(math.prod(layout.shape), 1))
    return update.div_((rms / clip_threshold).clamp_(min=1.0))


def _means(squares: Tensor, layout: Layout) -> Sums:
    """Means over the last dim and over the one before, of which one may be sharded."""
    if layout.dim == squares.dim() - 1:
        return (yield squares.sum(-1, keepdim=True)) / layout.shape[-1], squares.mean(-2, keepdim=True)
    rows = squares.mean(-1, keepdim=True)
    if layout.dim == squares.dim() - 2:
        return rows, (yield squares.sum(-2, keepdim=True)) / layout.shape[-2]
    return rows, squares.mean(-2, keepdim=True)


class AdafactorRule(Rule):
    moments = (Moment("exp_avg", signed=True, power=1),)
    turns = False

    def new_state(self, like: Tensor, layout: Layout, group: Group) -> State:
        wide = state_dtype(like.dtype)
        state: dict[str, Any] = {"step": 0}
        for key, size in _second(layout.shape).items():
            over = {"row": len(size) - 1, "col": len(size) - 2}.get(key)  # means over the sharded dim are replicated
            place = layout.like(size, None if layout.dim == over else layout.dim)
            state |= new_tensors(partial(_zeros, key, wide), like, place)
        if group["beta1"]:
            codec = codec_for(group["states"], layout.shape)
            state |= new_tensors(partial(codec.new, "exp_avg", wide=wide), like, codec.home(layout))
        return state

    def state_bytes(self, shape: Sequence[int], group: Group, dtype: torch.dtype) -> int:
        wide = state_dtype(dtype)
        second = sum(math.prod(size) for size in _second(shape).values()) * wide.itemsize
        return second + (codec_for(group["states"], shape).nbytes(shape, wide) if group["beta1"] else 0)

    def step_(self, items: list[Stepped], group: Group, *, lr: float, weight_decay: float, raw: bool = False) -> None:
        together(
            Job(
                item.layout,
                self._stepping(item, group, lr=lr, weight_decay=weight_decay),
                2 * math.prod(item.layout.shape),
            )
            for item in items
        )

    def _stepping(self, item: Stepped, group: Group, *, lr: float, weight_decay: float) -> Sums:
        state, p, layout = item.state, item.param, item.layout
        state["step"] += 1
        wide = state_dtype(p.dtype)
        update = yield from adafactor_direction(
            item.grad.to(wide), [state[key] for key in _second(layout.shape)], layout, step=state["step"],
            decay_rate=group["decay_rate"], clip_threshold=group["clip_threshold"],
        )  # fmt: skip
        update.mul_(lr)
        if group["beta1"]:
            codec = codec_for(group["states"], layout.shape)
            home = codec.home(layout)
            width = math.prod(home.local_shape[1:])
            first = codec.read(state, "exp_avg", slice(None), wide, signed=True, width=width)
            values = first.view(home.local_shape)
            values.lerp_(update if home.dim == layout.dim else layout.move(update, 0), 1.0 - group["beta1"])
            codec.write(state, "exp_avg", slice(None), first, signed=True)
            update = values if home.dim == layout.dim else home.move(values, 1)
        if p.dtype == wide:
            torch.sub(update, p, alpha=1.0 - lr * weight_decay, out=p).neg_()
        else:
            item.store(p, p.to(wide).mul_(1.0 - lr * weight_decay).sub_(update))


def _zeros(key: str, dtype: torch.dtype, like: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    return {key: like.new_zeros(tuple(shape), dtype=dtype)}


def _second(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Tensors of the second moment and their shapes."""
    if len(shape) < 2:
        return {"exp_avg_sq": tuple(shape)}
    return {"row": (*shape[:-1], 1), "col": (*shape[:-2], 1, shape[-1])}


class Adafactor(ComposedOptimizer):
    """Adafactor with a first moment, or without one where `beta1` is 0. With a `rank` in a group: GaLore-Adafactor.

    Further options: `states`, `rounding` and what `optim.options.SUBSPACE_DEFAULTS` lists.
    """

    rule = AdafactorRule()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta1: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decay_rate: float = 0.8,
        clip_threshold: float = 1.0,
        **options: Any,
    ) -> None:
        rates = {"beta1": beta1, "decay_rate": decay_rate, "clip_threshold": clip_threshold}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | rates, options)

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        if not 0 <= group["beta1"] < 1:
            raise ValueError(f"beta1={group['beta1']}: must lie in [0, 1); 0 keeps no first moment")
        for key in ("decay_rate", "clip_threshold"):
            if not 0 < group[key] < math.inf:
                raise ValueError(f"{key}={group[key]}: must be a finite number above 0")


class GaLoreAdafactor(Adafactor):
    """Adafactor under galore-torch's name, arguments and defaults, as far as its authors use them: a learning rate, and
    neither relative steps nor a scale by the weights' size. With compat="authors" bases are found by `svd`, as theirs.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        compat: str = "torch",
        **options: Any,
    ) -> None:
        if lr is None or scale_parameter or relative_step or warmup_init:
            raise ValueError(
                "GaLoreAdafactor takes a learning rate: give lr, scale_parameter=False, relative_step=False and "
                "warmup_init=False, as in the authors' scripts"
            )
        if eps[0] != DEAD:
            raise ValueError(f"eps={eps}: the first must be {DEAD:g}; the second belongs to scale_parameter")
        if compat == "authors":
            options = {"refresh": "svd", **options}
        options |= {"compat": compat, "decay_rate": abs(decay_rate), "clip_threshold": clip_threshold}
        super().__init__(params, lr, beta1 or 0.0, weight_decay, **options)
