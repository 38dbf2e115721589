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
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optim import fused
from optim.adam import adamw_update_
from optim.base import Group, State, contiguous_as, piece, state_dtype
from optim.codec import PLAIN, Codec, codec_for, rows_of
from optim.rounding import Store
from optim.sharded import new_tensors
from parallel.dtensor import WHOLE, Layout

CODED_CHUNK = 2**18
"""Values of a coded state that are decoded at a time on a CPU, so that the steps between find them in a cache."""

LANES = 64
"""Values that fused kernels on a CPU step at a time, at most. They round the rest of a tensor in another way (the last
bit of v), and so the largest magnitude of a block might depend on where a shard or a chunk ends."""


@dataclass(frozen=True)
class Moment:
    key: str
    signed: bool
    power: int
    """How it depends on the gradient: 1 turns with a basis, 2 by the squares."""


@dataclass(frozen=True)
class Stepped:
    """What one call steps: this rank's part of a tensor, its gradient, state, and how narrower weights are written."""

    param: Tensor
    grad: Tensor
    state: State
    store: Store = Tensor.copy_
    layout: Layout = WHOLE
    """Of the whole tensor; of `param` itself if not given."""
    fresh: bool = False
    """Whether `param` stands for zeros, which need not be there: the step is written, and nothing read."""

    def __post_init__(self) -> None:
        if self.layout is WHOLE:
            object.__setattr__(self, "layout", Layout(tuple(self.param.shape)))


class Rule:
    """Base of the rules. `step_` leaves W (1 - lr wd) - lr N in each tensor and its new moments in its state."""

    moments: tuple[Moment, ...] = ()
    turns = True
    """Whether the moments can follow a basis that turns."""
    authors_decay_last = False
    """Whether the authors' package lets weights decay after the update."""

    def new_state(self, like: Tensor, layout: Layout, group: Group) -> State:
        """State of a tensor of `layout`; this rank's part `like` of the weight decides device and precision."""
        state: dict[str, Any] = {"step": 0}
        codec, wide = codec_for(group["states"], layout.shape), state_dtype(like.dtype)
        for moment in self.moments:
            new = partial(codec.new, moment.key, wide=wide)
            state |= new_tensors(new, like, codec.home(layout))
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

    def takes_fresh(self, like: Tensor) -> bool:
        """Whether a tensor that is laid out as `like` can be stepped from zeros that are not there."""
        return False


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
        sorts: dict[tuple[Any, ...], list[Stepped]] = defaultdict(list)
        for item in items:
            codec = codec_for(group["states"], item.layout.shape)
            home = codec.home(item.layout)
            if home.dim != item.layout.dim:
                self._step_elsewhere(item, home, group, options)
                continue
            item.state["step"] += 1
            p, step = item.param, item.state["step"]
            if p.dtype == state_dtype(p.dtype) and codec is PLAIN and not item.fresh:
                sorts[p.device, p.dtype, step].append(item)
            elif not self.step_fused_(item, codec, group, **options):
                self._step_by_chunks(item, group, options)
        for (_, _, step), alike in sorts.items():
            params = [item.param for item in alike]
            grads = [contiguous_as(item.grad, item.param) for item in alike]
            moments = [[item.state[moment.key] for item in alike] for moment in self.moments]
            self.update_(params, grads, moments, step, group, **options)

    def step_fused_(
        self, item: Stepped, codec: Codec, group: Group, *, lr: float, weight_decay: float, raw: bool
    ) -> bool:
        """Step by one kernel that decodes, steps and encodes, where there is one; return whether there was."""
        return False

    def _step_elsewhere(self, item: Stepped, home: Layout, group: Group, options: dict[str, Any]) -> None:
        """Step a tensor whose state is sharded otherwise: its gradient goes there and the step comes back, by which a
        rank sends what it has of the tensor twice."""
        delta = item.grad.new_zeros(home.local_shape, dtype=state_dtype(item.param.dtype))
        grad = item.layout.move(item.grad, 0)
        substitute = Stepped(delta, grad, item.state, layout=home)
        self.step_([substitute], group, **options | {"weight_decay": 0.0})
        decay = 1.0 - options["lr"] * options["weight_decay"]
        if group.get("compat") == "authors":  # who decay afterwards
            delta.mul_(decay)
        delta = home.move(delta, 1)
        if item.param.dtype == delta.dtype:
            item.param.mul_(decay).add_(delta)
        else:
            item.store(item.param, item.param.to(delta.dtype).mul_(decay).add_(delta))

    def _step_by_chunks(self, item: Stepped, group: Group, options: dict[str, Any]) -> None:
        codec = codec_for(group["states"], item.layout.shape)
        wide = state_dtype(item.param.dtype)
        cached = codec is not PLAIN and item.param.device.type == "cpu"
        for rows in row_chunks(item.param, CODED_CHUNK if cached else piece(item.param)):
            part = rows_of(item.param, rows)
            width = math.prod(part.shape[1:])
            moments = [
                codec.read(item.state, moment.key, rows, wide, signed=moment.signed, width=width).view(part.shape)
                if codec is not PLAIN
                else rows_of(item.state[moment.key], rows)
                for moment in self.moments
            ]
            like = moments[0] if moments else part
            direct = part.dtype == wide and part.stride() == like.stride()
            weight = part if direct else torch.empty_like(like, dtype=wide).copy_(part)
            grad = contiguous_as(rows_of(item.grad, rows).to(wide), weight)
            operands = [weight, grad, *moments]
            ragged = codec is not PLAIN and weight.numel() % LANES != 0
            used = [padded(values) for values in operands] if ragged else operands
            self.update_(used[:1], used[1:2], [[m] for m in used[2:]], item.state["step"], group, **options)
            if ragged:
                for values, new in zip([weight, *moments], [used[0], *used[2:]], strict=True):
                    values.copy_(new[: values.numel()].view(values.shape))
            for moment, values in zip(self.moments, moments, strict=True):
                codec.write(item.state, moment.key, rows, values, signed=moment.signed)
            if not direct:
                item.store(part, weight)


class AdamRule(Elementwise):
    moments = (Moment("exp_avg", signed=True, power=1), Moment("exp_avg_sq", signed=False, power=2))
    authors_decay_last = True

    def update_(
        self, params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: int, group: Group,
        *, lr: float, weight_decay: float, raw: bool,
    ) -> None:  # fmt: skip
        adamw_update_(
            params, grads, *moments, step=step, lr=lr, betas=group["betas"], eps=group["eps"],
            weight_decay=weight_decay, authors=group.get("compat") == "authors", raw=raw,
        )  # fmt: skip

    def takes_fresh(self, like: Tensor) -> bool:
        return fused.usable(like)

    def step_fused_(
        self, item: Stepped, codec: Codec, group: Group, *, lr: float, weight_decay: float, raw: bool
    ) -> bool:
        if not (fused.usable(item.param, item.grad) and fused.writes(item.store)):
            return False
        rates = fused.Rates.of(
            item.state["step"], lr=lr, betas=group["betas"], eps=group["eps"], weight_decay=weight_decay,
            authors=group.get("compat") == "authors", raw=raw,
        )  # fmt: skip
        fused.adamw_(item.param, item.grad, item.state, codec, rates, store=item.store, fresh=item.fresh)
        return True

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


def padded(values: Tensor) -> Tensor:
    """A flat copy, with zeros up to a multiple of LANES."""
    return torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % LANES))


def row_chunks(tensor: Tensor, values: int) -> Iterator[slice]:
    """Slices of whole rows, about `values` numbers each. A tensor that is not contiguous stays whole: fused kernels
    walk raw memory, and rows of a transposed tensor have holes."""
    if tensor.dim() == 0 or tensor.numel() <= values or not tensor.is_contiguous():
        yield slice(None)
        return
    rows = max(values * tensor.shape[0] // tensor.numel(), 1)
    for start in range(0, tensor.shape[0], rows):
        yield slice(start, min(start + rows, tensor.shape[0]))
