"""Every optimizer here: projection x update rule x way back x state codec, chosen by class and group options.

A group without a `rank`, and every tensor that is not a matrix, takes the rule as it is. A matrix of a group with a
`rank` is projected (`subspace.py`), the rule steps in the subspace, and its step comes back into the weight
(`lift.py`): turned back (GaLore), as a scale on the gradient (APOLLO), or both (Fira).
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.base import Group, MemoryOptimizer, State, is_pretended, state_dtype
from optim.codec import CODECS
from optim.int8 import rounder
from optim.lift import LIFTS, Projected
from optim.options import COMPAT, DEFAULTS, ROUNDING, SUBSPACE_DEFAULTS, check_subspace, require_known
from optim.rounding import Store
from optim.rules import AdamRule, Rule, Stepped
from optim.sharded import LocalState, sum_parts
from optim.subspace import Subspace
from parallel.dtensor import Layout, local

log = logging.getLogger(__name__)

HELD = {False: 2**19, True: 2**25}
"""Values of projected gradients and steps that are held at a time: off CUDA, where a cache holds them, and on it
(128 MiB in fp32), where each kernel has to be launched."""


@dataclass(frozen=True)
class Known:
    """What is the same in every step of a parameter, found once."""

    name: str
    layout: Layout
    subspace: Subspace | None
    """None where it is not projected."""
    group: Group
    shard_group: dist.ProcessGroup | None


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
        self._known: dict[Tensor, Known] = {}
        super().__init__(params, known | defaults | options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {}  # of groups that are no more

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
        reduced = [p for p in params if p in self.reduced]
        named = self._without_non_finite([self._stepped(p, group) for p in params if p not in self.reduced])
        plain = [item for item, known in named if known.subspace is None]
        if plain:
            self.rule.step_(plain, group, lr=group["lr"], weight_decay=group["weight_decay"])
        for batch in _batches([self._stepped(p, group, self.reduced.pop(p)) for p in reduced]):
            self.step_matrices(batch, group, reduced=True)
        for batch in _batches([(item, known) for item, known in named if known.subspace is not None]):
            self.step_matrices(batch, group)

    def step_matrices(self, batch: list[tuple[Stepped, Known]], group: Group, *, reduced: bool = False) -> None:
        """Step projected matrices of one device and dtype; those whose gradient is not finite are left as they are.

        Args:
            reduced: the items have R, which a linear way back takes, for their gradient.
        """
        found = [self._project(item, known, reduced) for item, known in batch]
        if self.check_finite and not reduced:
            found = self._finite(found, [known for _, known in batch])
        if found:
            LIFTS[self.lift_of(group)].step_(found, self.rule, group)

    def _project(self, item: Stepped, known: Known, reduced: bool) -> Projected:
        state, subspace = item.state, known.subspace
        assert subspace is not None
        low = None
        if reduced:
            low = item.grad
        elif subspace.due(state):
            low = self._refresh(item.grad, state, subspace, known.name)
        basis = subspace.basis(state, state_dtype(item.param.dtype), known.name)
        return Projected(item, subspace, basis, subspace.project(item.grad, basis) if low is None else low)

    def _finite(self, found: list[Projected], known: list[Known]) -> list[Projected]:
        """Leave out matrices whose gradient is not finite: one read from the device for all.

        One non-finite element of G makes at least one of R non-finite (0 times inf is NaN), and R is smaller.
        """
        whole = [each for each in found if each.item.layout.whole]
        if not whole:
            return found
        finite = torch.stack([each.low.sum() for each in whole]).isfinite()
        sound = [True] * len(whole) if is_pretended(finite) else finite.tolist()
        bad = {id(each) for each, good in zip(whole, sound, strict=True) if not good}
        for each, own in zip(found, known, strict=True):
            if id(each) in bad:
                self._skip(own.name)
        return [each for each in found if id(each) not in bad]

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

    def _stepped(self, p: Tensor, group: Group, grad: Tensor | None = None) -> tuple[Stepped, Known]:
        """What a step takes of a parameter; its own gradient where none is given."""
        known = self._known_of(p, group)
        grad = p.grad if grad is None else grad
        assert grad is not None, "update() is given parameters with gradients"
        state = LocalState(self.state[p]) if isinstance(p, DTensor) else self.state[p]
        store = self._store(p, known, group)
        return Stepped(local(p), local(grad), state, store, known.layout), known

    def _known_of(self, p: Tensor, group: Group) -> Known:
        found = self._known.get(p)
        if found is None or found.group is not group or found.shard_group is not self.shard_group:
            # Of this one alone: others may be without their values just now, and of no shape (engines/partitioned.py).
            place = next(i for i, each in enumerate(group["params"]) if each is p)
            names, layout = group.get("param_names"), self._layout(p)
            subspace = Subspace(layout.shape, group, layout) if _projected(layout.shape, group) else None
            name = names[place] if names else f"parameter {place}"
            self._known[p] = Known(name, layout, subspace, group, self.shard_group)
            found = self._known[p]
        return found

    def _layout(self, p: Tensor) -> Layout:
        return Layout.of(p, self.shard_group)

    def _without_non_finite(self, named: list[tuple[Stepped, Known]]) -> list[tuple[Stepped, Known]]:
        """Leave out sharded parameters whose gradient is not finite on some rank, agreed by one sum of each group."""
        shared = [item for item, _ in named if not item.layout.whole]
        if not (self.check_finite and shared):
            return named
        flags = [item.grad.sum(dtype=state_dtype(item.grad.dtype)).isfinite().logical_not_().float() for item in shared]
        totals = sum_parts([(item.layout, flag) for item, flag in zip(shared, flags, strict=True)])
        unsound = torch.stack(totals)
        found = [] if is_pretended(unsound) else unsound.tolist()
        bad = {id(item) for item, flag in zip(shared, found, strict=False) if flag}
        for item, known in named:
            if id(item) in bad:
                self._skip(known.name)
        return [(item, known) for item, known in named if id(item) not in bad]

    def _skip(self, name: str) -> None:
        self.skipped += 1
        log.warning("gradient of %s is not finite: weight and state left as they were", name)

    def _refresh(self, grad: Tensor, state: State, subspace: Subspace, name: str) -> Tensor | None:
        return subspace.refresh(grad, state, self.rule.moments, name)

    def _store(self, p: Tensor, known: Known, group: Group) -> Store:
        if group["rounding"] == "nearest":
            return Tensor.copy_
        layout, where = known.layout, {}
        if layout.dim is not None:
            first, inner = layout.mine.start, math.prod(layout.shape[layout.dim + 1 :])
            cut = {"column": first * inner, "pitch": layout.shape[layout.dim] * inner}
            where = {"row": first} if layout.dim == 0 else cut
        return rounder(local(p), known.name, self.state[p]["step"], group["rounding"], **where)

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


def _batches(named: list[tuple[Stepped, Known]]) -> Iterator[list[tuple[Stepped, Known]]]:
    """Matrices of one device and dtype whose projected gradients fit into HELD, together: fewer and larger kernels.

    The same on all ranks, which sum for a batch at once.
    """
    batch: list[tuple[Stepped, Known]] = []
    held, kind = 0, None
    for item, known in named:
        assert known.subspace is not None
        values = 2 * math.prod(known.subspace.low_shape) // known.layout.count
        own = item.param.device, state_dtype(item.param.dtype)
        if batch and (own != kind or held + values > HELD[item.param.device.type == "cuda"]):
            yield batch
            batch, held = [], 0
        batch.append((item, known))
        held, kind = held + values, own
    if batch:
        yield batch


def _projected(shape: Sequence[int], group: Group) -> bool:
    return group.get("rank") is not None and len(shape) == 2
