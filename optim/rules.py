"""Update rules: from gradient and moments to a step, for a weight or for what stands in for it in a subspace.

A rule says which moments a tensor has and how one step changes tensor and moments. It knows neither projections nor
codecs: moments come decoded from `states`, and a weight of lower precision is widened, stepped and rounded once.

    adam       AdamW, Loshchilov, Hutter 2019, arXiv:1711.05101
    sgd        m <- mu m + G;  W <- W - lr m (torch.optim.SGD without dampening, decay decoupled)
    adafactor  in adafactor.py
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.adam import adamw_update_
from optim.base import CHUNK, Group, State, contiguous_as, state_dtype
from optim.codec import PLAIN, codec_for, rows_of
from optim.rounding import Store

CODED_CHUNK = 2**18
"""Values of a coded state that are decoded at a time, so that the steps between find them in a cache."""


@dataclass(frozen=True)
class Moment:
    key: str
    signed: bool
    power: int
    """How it depends on the gradient: 1 turns with a basis, 2 by the squares."""


@dataclass(frozen=True)
class Stepped:
    """What one call steps: tensors of a kind, with gradients, states and ways to write a narrower weight."""

    param: Tensor
    grad: Tensor
    state: State
    store: Store = Tensor.copy_


class Rule:
    """Base of the rules. `step_` leaves W (1 - lr wd) - lr N in each tensor and its new moments in its state."""

    moments: tuple[Moment, ...] = ()
    turns = True
    """Whether the moments can follow a basis that turns."""

    def new_state(self, like: Tensor, shape: Sequence[int], group: Group) -> State:
        """State of a tensor of `shape` on the device of `like`, whose dtype decides the precision."""
        state: State = {"step": 0}
        for moment in self.moments:
            codec = codec_for(group["states"], shape)
            state |= codec.new(moment.key, like, shape, state_dtype(like.dtype))
        return state

    def state_bytes(self, shape: Sequence[int], group: Group, dtype: torch.dtype) -> int:
        """Bytes of all tensors of `new_state`."""
        codec = codec_for(group.get("states", "fp32"), shape)
        return len(self.moments) * codec.nbytes(shape, state_dtype(dtype))

    def step_(self, items: list[Stepped], group: Group, *, lr: float, weight_decay: float, raw: bool = False) -> None:
        """Step in place. `raw` leaves Adam's bias correction out; see `bias`."""
        raise NotImplementedError

    def bias(self, step: int, group: Group) -> float:
        """Factor that a `raw` step lacks."""
        return 1.0


class Elementwise(Rule):
    """A rule whose values do not see each other: steps many tensors in one call, or one by chunks of rows."""

    def update_(
        self, params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: int, group: Group,
        *, lr: float, weight_decay: float, raw: bool,
    ) -> None:  # fmt: skip
        """Step tensors of one device and dtype, all laid out alike, in place."""
        raise NotImplementedError

    def step_(self, items: list[Stepped], group: Group, *, lr: float, weight_decay: float, raw: bool = False) -> None:
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "raw": raw}
        together: dict[tuple[Any, ...], list[Stepped]] = defaultdict(list)
        for item in items:
            item.state["step"] += 1
            p, step = item.param, item.state["step"]
            if p.dtype == state_dtype(p.dtype) and codec_for(group["states"], p.shape) is PLAIN:
                together[p.device, p.dtype, step].append(item)
            else:
                self._step_by_chunks(item, group, options)
        for (_, _, step), alike in together.items():
            params = [item.param for item in alike]
            grads = [contiguous_as(item.grad, item.param) for item in alike]
            moments = [[item.state[moment.key] for item in alike] for moment in self.moments]
            self.update_(params, grads, moments, step, group, **options)

    def _step_by_chunks(self, item: Stepped, group: Group, options: dict[str, Any]) -> None:
        codec = codec_for(group["states"], item.param.shape)
        wide = state_dtype(item.param.dtype)
        for rows in row_chunks(item.param, CHUNK if codec is PLAIN else CODED_CHUNK):
            part = rows_of(item.param, rows)
            moments = [
                codec.read(item.state, moment.key, rows, wide, signed=moment.signed).view(part.shape)
                if codec is not PLAIN
                else rows_of(item.state[moment.key], rows)
                for moment in self.moments
            ]
            like = moments[0] if moments else part
            direct = part.dtype == wide and part.stride() == like.stride()
            weight = part if direct else torch.empty_like(like, dtype=wide).copy_(part)
            grad = contiguous_as(rows_of(item.grad, rows).to(wide), weight)
            self.update_([weight], [grad], [[m] for m in moments], item.state["step"], group, **options)
            for moment, values in zip(self.moments, moments, strict=True):
                codec.write(item.state, moment.key, rows, values, signed=moment.signed)
            if not direct:
                item.store(part, weight)


class AdamRule(Elementwise):
    moments = (Moment("exp_avg", signed=True, power=1), Moment("exp_avg_sq", signed=False, power=2))

    def update_(
        self, params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: int, group: Group,
        *, lr: float, weight_decay: float, raw: bool,
    ) -> None:  # fmt: skip
        adamw_update_(
            params, grads, *moments, step=step, lr=lr, betas=group["betas"], eps=group["eps"],
            weight_decay=weight_decay, authors=group.get("compat") == "authors", raw=raw,
        )  # fmt: skip

    def bias(self, step: int, group: Group) -> float:
        beta1, beta2 = group["betas"]
        return math.sqrt(1.0 - beta2**step) / float(1.0 - beta1**step)


class SGDRule(Elementwise):
    moments = (Moment("momentum_buffer", signed=True, power=1),)

    def update_(
        self, params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: int, group: Group,
        *, lr: float, weight_decay: float, raw: bool,
    ) -> None:  # fmt: skip
        if weight_decay:
            torch._foreach_mul_(params, 1.0 - lr * weight_decay)
        torch._foreach_mul_(moments[0], group["momentum"])
        torch._foreach_add_(moments[0], grads)
        torch._foreach_add_(params, moments[0], alpha=-lr)


def row_chunks(tensor: Tensor, values: int) -> Iterator[slice]:
    """Slices of whole rows, about `values` numbers each. A tensor that is not contiguous stays whole: fused kernels
    walk raw memory, and rows of a transposed tensor have holes."""
    if tensor.dim() == 0 or tensor.numel() <= values or not tensor.is_contiguous():
        yield slice(None)
        return
    rows = max(values * tensor.shape[0] // tensor.numel(), 1)
    for start in range(0, tensor.shape[0], rows):
        yield slice(start, min(start + rows, tensor.shape[0]))
