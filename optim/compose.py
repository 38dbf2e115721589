"""Every optimizer here: projection x update rule x way back x state codec, chosen by class and group options.

A group without a `rank`, and every tensor that is not a matrix, takes the rule as it is. A matrix of a group with a
`rank` is projected (`subspace.py`), the rule steps in the subspace, and its step comes back into the weight
(`lift.py`): turned back (GaLore), as a scale on the gradient (APOLLO), or both (Fira).
"""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from optim.base import Group, MemoryOptimizer, State, read, state_dtype
from optim.codec import CODECS
from optim.int8 import rounder
from optim.lift import LIFTS
from optim.options import COMPAT, DEFAULTS, ROUNDING, SUBSPACE_DEFAULTS, check_subspace, require_known
from optim.rounding import Store
from optim.rules import AdamRule, Rule, Stepped
from optim.sharded import Job, LocalState, Sums, sum_parts, together
from optim.subspace import Subspace
from parallel.dtensor import Layout, local

log = logging.getLogger(__name__)


class ComposedOptimizer(MemoryOptimizer):
    """Base of the named optimizers: they choose `rule` and `lift` and the defaults of the options.

    `skipped` counts updates left out because a matrix's gradient was not finite: its weight, moments and basis stay
    as they were, and a refresh that was due is made at the next step. The trainer finds such gradients before any
    optimizer runs; this guards other loops, at the price of one read per matrix from the device. Sharded parameters
    of all kinds are guarded, with one sum over the ranks and one read for a group: none of them steps a part.

    A parameter may be a DTensor (FSDP2): it is stepped shard by shard, with the same result.
    """

    rule: Rule = AdamRule()
    lift: str = "back"
    choices: dict[str, Any] = SUBSPACE_DEFAULTS
    """Options of the class beyond DEFAULTS, with what it chooses where the user does not."""
    skipped: int = 0

    def __init__(self, params: Any, defaults: Group, options: Group) -> None:
        known = DEFAULTS | self.choices
        unknown = [key for key in options if key not in known]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {unknown[0]}; it has {', '.join(known)}")
        super().__init__(params, known | defaults | options)

    @classmethod
    def lift_of(cls, group: Group) -> str:
        """Name of the way back that a group takes."""
        return cls.lift

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        require_known(group, "states", tuple(CODECS))
        require_known(group, "rounding", ROUNDING)
        if "compat" in group:
            require_known(group, "compat", COMPAT)
        if group.get("rank") is not None:
            self.check_matrix_options(group)
            self._warn_of_cut_ranks(group)

    def check_matrix_options(self, group: Group) -> None:
        """Raise ValueError if the options of a group with a `rank` make no sense."""
        check_subspace(group, self.lift_of(group), self.rule)

    def init_state(self, p: Tensor, group: Group) -> State:
        layout = self._layout(p)
        if not _projected(p.shape, group):
            return self.rule.new_state(local(p), layout, group)
        if not layout.whole and group.get("compat") == "authors" and group["refresh"] == "svd":
            raise ValueError(
                f"{self.name_of(p)} is sharded, and compat='authors' with refresh='svd' follows the signs of the "
                "solver on the whole gradient, which no rank has. Use compat='torch', or parallel.zero=0."
            )
        return self.matrix_state(p, group)

    def matrix_state(self, p: Tensor, group: Group) -> State:
        """State of a projected matrix."""
        subspace = Subspace(p.shape, group, self._layout(p))
        p = local(p)
        state = {**self.rule.new_state(p, subspace.low, group), **subspace.new_state(p)}
        if LIFTS[self.lift_of(group)].limited:
            state["growth"] = p.new_zeros((), dtype=state_dtype(p.dtype))
        return state

    def update(self, params: list[Tensor], group: Group) -> None:
        named = []
        for p, name in self._named(params, group):
            if p in self.reduced:
                item = self._stepped(p, self.reduced.pop(p), name, group)
                together([Job(item.layout, self._step_reduced(item, group), item.grad.numel())])
                continue
            assert p.grad is not None, "update() is given parameters with gradients"
            named.append((self._stepped(p, p.grad, name, group), name))
        named = self._without_non_finite(named)
        plain = [item for item, _ in named if not _projected(item.layout.shape, group)]
        projected = [(item, name) for item, name in named if _projected(item.layout.shape, group)]
        if plain:
            self.rule.step_(plain, group, lr=group["lr"], weight_decay=group["weight_decay"])
        stepped = together(
            Job(item.layout, self.step_matrix(item, name, group), 2 * group["rank"] * max(item.layout.shape))
            for item, name in projected
        )
        for (_, name), done in zip(projected, stepped, strict=True):
            if not done:
                self._skip(name)

    def step_matrix(self, item: Stepped, name: str, group: Group) -> Sums:
        """Step one projected matrix. Returns False, with nothing written, if its gradient is not finite."""
        state, subspace = item.state, Subspace(item.layout.shape, group, item.layout)
        low = self._refresh(item.grad, state, subspace, name) if subspace.due(state) else None
        basis = subspace.basis(state, state_dtype(item.param.dtype), name)
        if low is None:
            low = subspace.project(item.grad, basis)
        # One non-finite element of G makes at least one of R non-finite (0 times inf is NaN), and R is smaller.
        if self.check_finite and item.layout.whole and not read(torch.isfinite(low.sum()), usual=1.0):
            return False
        yield from LIFTS[self.lift_of(group)].step_(item, self.rule, low, basis, subspace, group)
        return True

    def reduced_bytes(self, p: Tensor, group: Group) -> int | None:
        """Bytes of R, where the step is a step on R alone."""
        if not _projected(p.shape, group) or not LIFTS[self.lift_of(group)].linear:
            return None
        return math.prod(Subspace(p.shape, group).low_shape) * state_dtype(p.dtype).itemsize

    def reduces(self, p: Tensor, group: Group) -> bool:
        """Whether the next step is one on R alone: by a basis that stays this time."""
        return self.reduced_bytes(p, group) is not None and not Subspace(p.shape, group).due(self.state[p])

    def reduce_(self, p: Tensor, group: Group) -> None:
        """Add R = project(G), in fp32 at least, to `reduced[p]`; free `p.grad`. Of a shard, its part of R."""
        assert p.grad is not None
        subspace = Subspace(p.shape, group, self._layout(p))
        with self.residency.here(p, written=False):
            basis = subspace.basis(LocalState(self.state[p]), state_dtype(p.dtype))
            low = subspace.project(local(p.grad), basis)
        p.grad = None
        self.reduced[p] = self.reduced[p].add_(low) if p in self.reduced else low

    def _step_reduced(self, item: Stepped, group: Group) -> Sums:
        """Step by R, which a linear way back takes instead of the gradient."""
        subspace = Subspace(item.layout.shape, group, item.layout)
        basis = subspace.basis(item.state, state_dtype(item.param.dtype))
        yield from LIFTS[self.lift_of(group)].step_(item, self.rule, item.grad, basis, subspace, group)

    def _stepped(self, p: Tensor, grad: Tensor, name: str, group: Group) -> Stepped:
        store = self._store(p, name, group)
        if not isinstance(p, DTensor):
            return Stepped(p, grad, self.state[p], store)
        return Stepped(local(p), local(grad), LocalState(self.state[p]), store, self._layout(p))

    def _layout(self, p: Tensor) -> Layout:
        return Layout.of(p, self.shard_group)

    def _without_non_finite(self, named: list[tuple[Stepped, str]]) -> list[tuple[Stepped, str]]:
        """Leave out sharded parameters whose gradient is not finite on some rank, agreed by one sum of each group."""
        shared = [item for item, _ in named if not item.layout.whole]
        if not (self.check_finite and shared):
            return named
        flags = [item.grad.sum(dtype=state_dtype(item.grad.dtype)).isfinite().logical_not_().float() for item in shared]
        totals = sum_parts([(item.layout, flag) for item, flag in zip(shared, flags, strict=True)])
        unsound = torch.stack(totals)
        found = [] if isinstance(unsound, FakeTensor) or unsound.is_meta else unsound.tolist()
        bad = {id(item) for item, flag in zip(shared, found, strict=False) if flag}
        for item, name in named:
            if id(item) in bad:
                self._skip(name)
        return [(item, name) for item, name in named if id(item) not in bad]

    def _skip(self, name: str) -> None:
        self.skipped += 1
        log.warning("gradient of %s is not finite: weight and state left as they were", name)

    def _refresh(self, grad: Tensor, state: State, subspace: Subspace, name: str) -> Tensor | None:
        return subspace.refresh(grad, state, self.rule.moments, name)

    def _named(self, params: list[Tensor], group: Group) -> list[tuple[Tensor, str]]:
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        known = {id(p): name for p, name in zip(group["params"], names, strict=True)}
        return [(p, known[id(p)]) for p in params]

    def _store(self, p: Tensor, name: str, group: Group) -> Store:
        layout, where = self._layout(p), {}
        if layout.dim is not None:
            first, inner = layout.mine.start, math.prod(layout.shape[layout.dim + 1 :])
            cut = {"column": first * inner, "pitch": layout.shape[layout.dim] * inner}
            where = {"row": first} if layout.dim == 0 else cut
        return rounder(local(p), name, self.state[p]["step"], group["rounding"], **where)

    def _warn_of_cut_ranks(self, group: Group) -> None:
        cut = [p for p in group["params"] if p.dim() == 2 and min(p.shape) < group["rank"]]
        if cut:
            warnings.warn(
                f"rank={group['rank']} exceeds the smaller side of {len(cut)} matrices, such as {self.name_of(cut[0])} "
                f"{tuple(cut[0].shape)}: each takes the full rank of its smaller side, which saves little or nothing",
                stacklevel=2,
            )

    @classmethod
    def state_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype = torch.float32) -> int:
        if not _projected(shape, group):
            return cls.rule.state_bytes(shape, group, dtype)
        return cls.matrix_bytes(shape, group, dtype)

    @classmethod
    def matrix_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype) -> int:
        """Bytes of the tensors of `matrix_state`."""
        subspace = Subspace(shape, group)
        growth = state_dtype(dtype).itemsize if LIFTS[cls.lift_of(group)].limited else 0
        return cls.rule.state_bytes(subspace.low_shape, group, dtype) + subspace.state_bytes(dtype) + growth


def _projected(shape: Sequence[int], group: Group) -> bool:
    return group.get("rank") is not None and len(shape) == 2
