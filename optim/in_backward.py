"""The update inside backward: each parameter steps, and its gradient is freed, as soon as that gradient is complete.

    updates = InBackward(optimizer)
    for micro in micros[:-1]:
        with updates.keep():            # gradients add up
            loss(micro).backward()
    with updates.update() as found:     # each hook steps its parameter
        loss(micros[-1]).backward()

A hook sits on every trainable parameter. Autograd runs it once a backward, when all uses of the parameter have been
summed (a tied weight: after the last of them). So the gradients alive at once are those of one parameter and a few in
flight, and not those of all; but what adds up over micro-steps has to be kept between them. Of a linear projection
(GaLore) between two refreshes that is R = project(G) alone, which is exact, as R is linear in G and the basis stays;
of everything else it is the whole gradient.

Several replicas: no DDP and no buckets. Each hook sums its own gradient over the ranks, R instead of G where that is
all the step needs, asynchronously and in one order on all ranks. A parameter that no rank used steps with a gradient
of zero there, while a process alone leaves it as it is.

Shards (FSDP2): the hooks run after the reduce-scatter, at every micro-step that makes one, and step this rank's part;
norms are sums over the ranks, of one number a parameter, in the order in which FSDP2 reduces.

Clipping (`clip_by`), as the global norm is not known before the last gradient is:
    parameter   each gradient is scaled down to `clip_norm` by its own norm
    previous    all are scaled as the global norm of the step before asks; at the first step as `parameter`
    two_pass    a first backward measures the global norm and keeps nothing, a second one updates: exact

A gradient that is not finite leaves its parameter and state as they were, on all ranks, as the sum over ranks is the
same everywhere; the others step. With `two_pass` the caller knows before anything steps.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.base import MemoryOptimizer, is_pretended, read, state_dtype
from parallel.collectives import from_leader
from parallel.dtensor import Layout, local
from parallel.launch import World

SUMMING = 2
"""Gradients whose sum over the ranks may be under way at once."""
READING = 2
"""CUDA only: gradients whose norm may be on its way to the host, so that the host waits for none of the kernels that
backward has queued since."""
SAFE = 1e-6
"""Added to a norm that divides, as torch's clipping does."""

CLIP_BY = ("parameter", "previous", "two_pass")


@dataclass
class Found:
    """What one backward has shown, once it has ended."""

    norm: float | None = None
    """Global norm of the gradients; None where only projections of some were at hand."""
    left_out: list[str] = field(default_factory=list)
    """Names of the parameters whose gradient was not finite."""


class Norm:
    """The norm of a gradient on its way to the host; of shards, that of the whole, by a sum over `layout`'s ranks."""

    def __init__(self, values: Tensor, layout: Layout) -> None:
        self._scalar = layout.norms(values, dtype=state_dtype(values.dtype)).squeeze(0)
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda and not is_pretended(values):
            self._scalar = torch.empty_like(self._scalar, device="cpu", pin_memory=True).copy_(
                self._scalar, non_blocking=True
            )
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def value(self) -> float:
        """Wait for it, and for nothing that was queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return read(self._scalar, usual=1.0)


@dataclass
class Flying:
    """A gradient between its backward and its step."""

    p: Tensor
    values: Tensor
    """`p.grad`, or R; this rank's part."""
    whole: bool
    work: dist.Work | None
    norm: Norm | None = None


class InBackward:
    """Steps the parameters of `optimizer` from hooks in backward.

    Outside of `keep`, `measure` and `update` gradients go to `.grad` as ever.

    Args:
        optimizer: it must see every trainable parameter.
        world: its ranks are replicas, each with gradients of its own rows, unless the parameters are DTensors.
        clip_norm: 0 does not clip.
    """

    def __init__(
        self, optimizer: MemoryOptimizer, world: World | None = None, *, clip_norm: float = 0.0,
        clip_by: str = "parameter",
    ) -> None:  # fmt: skip
        if clip_norm > 0 and clip_by not in CLIP_BY:
            raise ValueError(
                f"clip_by={clip_by!r}: must be one of {', '.join(CLIP_BY)}; the norm of all is not known in time"
            )
        self.optimizer = optimizer
        self.previous: float | None = None
        """Global norm of the last step, where `previous` needs it; belongs into a checkpoint."""
        self._world = world or World()
        shard_group = getattr(optimizer, "shard_group", None)
        self._clip_norm, self._clip_by = clip_norm, clip_by
        self._group_of = {p: g for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
        self._layouts = {p: Layout.of(p, shard_group) for p in self._group_of}
        sharded = any(isinstance(p, DTensor) for p in self._group_of)
        self._sums = self._world.process_count > 1 and not sharded
        self._order = list(reversed(self._group_of))
        self._ordered = False
        self._pass: Literal["keep", "measure", "update"] | None = None
        self._limit: float | None = None
        self._before: Callable[[], object] | None = None
        self._arrived: dict[Tensor, None] = {}
        self._taken = 0
        self._flying: deque[Flying] = deque()
        self._found, self._squares, self._known = Found(), 0.0, True
        self._hooks = [p.register_post_accumulate_grad_hook(self._hook) for p in self._group_of]  # type: ignore[no-untyped-call]

    @property
    def needs_whole(self) -> bool:
        """Whether clipping needs the norms of whole gradients, also where the step does not."""
        return self._clip_norm > 0 and self._clip_by != "two_pass"

    def accumulates_low(self, p: Tensor) -> bool:
        """Whether what adds up for the next step of `p` is the projected gradient alone."""
        return not self.needs_whole and self.optimizer.reduces(p, self._group_of[p])

    def kept_bytes(self) -> tuple[int, int]:
        """Bytes that `keep` keeps for a step without a refresh: of projected gradients, and of whole ones."""
        projected = whole = 0
        for p, group in self._group_of.items():
            low = None if self.needs_whole else self.optimizer.reduced_bytes(p, group)
            projected += (low or 0) // self._layouts[p].count
            whole += local(p).nbytes if low is None else 0
        return projected, whole

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Let the gradients of a backward inside add up for a later one."""
        with self._running("keep"):
            yield

    @contextmanager
    def measure(self) -> Iterator[Found]:
        """Find the norm of the gradients of one backward inside, without keeping them, for the next `update`."""
        assert not any(p.grad is not None for p in self._group_of), "nothing may have been kept: it would be lost"
        with self._running("measure"):
            yield self._found
            self._finish()
        self._limit = self._found.norm

    @contextmanager
    def update(self, before: Callable[[], object] | None = None) -> Iterator[Found]:
        """Step each parameter in the one backward inside, with what `keep` has kept.

        Args:
            before: called before each weight or state that changes, the first time when the first gradient is complete.
        """
        assert self._clip_norm == 0 or self._clip_by != "two_pass" or self._limit is not None, "measure comes first"
        self._before = before
        with self._running("update"):
            yield self._found
            self._finish()
        self._limit = None
        if self._found.norm is not None and math.isfinite(self._found.norm):
            self.previous = self._found.norm

    def drop(self) -> None:
        """Free all gradients, kept ones included."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.reduced.clear()
        self._limit = None

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def _running(self, name: Literal["keep", "measure", "update"]) -> Iterator[None]:
        assert self._pass is None, "one pass at a time"
        self._pass = name
        self._found, self._squares, self._known = Found(), 0.0, True
        try:
            yield
        finally:
            self._pass = None
            self.optimizer.residency.rest()
            self._arrived.clear()
            self._taken = 0
            self._flying.clear()

    @torch.no_grad()
    def _hook(self, p: Tensor) -> None:
        if self._pass is None:
            return
        if self._pass == "keep":
            if self.accumulates_low(p):
                self.optimizer.reduce_(p, self._group_of[p])
            return
        if p in self._arrived:
            raise RuntimeError(
                f"{self.optimizer.name_of(p)} got a second gradient in one backward, after it was stepped with the "
                "first. Reentrant activation checkpointing does so; use use_reentrant=False."
            )
        self._arrived[p] = None
        if not self._sums:
            self._take(p)
            return
        while self._taken < len(self._order) and self._order[self._taken] in self._arrived:
            self._take(self._order[self._taken])
            self._taken += 1

    def _take(self, p: Tensor) -> None:
        """Send one complete gradient on its way, and end the way of those before it."""
        self.optimizer.refuse_sparse([p])
        # With the whole gradient at hand and nobody to send it to, its norm is known and the step projects by itself.
        low = self._pass == "update" and self.accumulates_low(p) and (self._sums or p in self.optimizer.reduced)
        if low and p.grad is not None:
            self.optimizer.reduce_(p, self._group_of[p])
        values = self.optimizer.reduced[p] if low else p.grad
        assert values is not None
        values = local(values)
        work = dist.all_reduce(values, group=self._world.gradients, async_op=True) if self._sums else None
        self._flying.append(Flying(p, values, not low, work))
        self._advance(SUMMING if self._sums else 0, READING if values.is_cuda else 0)

    def _advance(self, summing: int, reading: int) -> None:
        """Leave at most so many gradients at each stage."""
        for flying in islice(self._flying, max(len(self._flying) - summing, 0)):
            if flying.norm is None:
                if flying.work is not None:
                    flying.work.wait()
                flying.norm = Norm(flying.values, self._layouts[flying.p])
        while len(self._flying) > summing + reading:
            self._settle(self._flying.popleft())

    def _settle(self, flying: Flying) -> None:
        """Step a parameter whose gradient is summed and measured, or leave it out; free the gradient."""
        p, norm = flying.p, flying.norm
        assert norm is not None
        value = norm.value()
        self._squares += value * value
        self._known &= flying.whole
        if self._pass == "update":
            if math.isfinite(value):
                self._clip(flying.values, value)
                if self._before is not None:
                    self._before()
                self.optimizer.step_one(p, self._group_of[p])
            else:
                self._found.left_out.append(self.optimizer.name_of(p))
        p.grad = None
        self.optimizer.reduced.pop(p, None)

    def _clip(self, values: Tensor, own: float) -> None:
        if self._clip_norm == 0:
            return
        known = {"parameter": None, "previous": self.previous, "two_pass": self._limit}[self._clip_by]
        norm = own if known is None else known
        if norm > self._clip_norm:
            values.mul_(self._clip_norm / (norm + SAFE))

    @torch.no_grad()
    def _finish(self) -> None:
        """End what is still on its way: also of parameters that only earlier micro-steps, or other ranks, have used."""
        self._advance(0, 0)
        for p in self._order[self._taken :] if self._sums else self._group_of:
            if p.grad is not None or p in self.optimizer.reduced:
                self._take(p)
            elif self._sums:
                p.grad = torch.zeros_like(p)
                self._take(p)
        self._advance(0, 0)
        self._found.norm = math.sqrt(self._squares) if self._known else None
        if self._sums and not self._ordered:
            self._agree_on_order()

    def _agree_on_order(self) -> None:
        """From now on, sum in the order in which gradients came on rank 0, so that none has to wait for its turn."""
        places = {p: index for index, p in enumerate(self._group_of)}
        came = [places.pop(p) for p in self._arrived]
        order = from_leader(self._world, [*came, *places.values()])
        parameters = list(self._group_of)
        self._order, self._ordered = [parameters[index] for index in order], True
