"""Every optimizer here: projection x update rule x way back x state codec, chosen by class and group options.

A group without a `rank`, and every tensor that is not a matrix, takes the rule as it is. A matrix of a group with a
`rank` is projected (`subspace.py`), the rule steps in the subspace, and its step comes back into the weight
(`lift.py`): turned back (GaLore), as a scale on the gradient (APOLLO), or both (Fira).
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.base import Group, MemoryOptimizer, State, read, state_dtype
from optim.codec import CODECS, PLAIN, codec_for
from optim.lift import LIFTS
from optim.projection import project
from optim.rounding import Store, stochastic
from optim.rules import AdamRule, Rule, Stepped
from optim.subspace import Subspace, check_subspace

log = logging.getLogger(__name__)

ROUNDING = ("nearest", "stochastic")
COMPAT = ("torch", "authors")
DEFAULTS: dict[str, Any] = {"states": "fp32", "rounding": "nearest"}
"""Options that every optimizer takes."""
SUBSPACE_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "refresh": "warm",
    "on_refresh": "keep",
    "basis": "fp32",
    "stagger": False,
    "lazy": False,
    "lazy_threshold": 0.4,
    "compat": "torch",
}
"""Options of those that project:

rank: rank of the subspace; a group without one is not projected.
update_proj_gap: steps between two refreshes of the basis.
scale: factor on the projected step; it does not touch the weight decay.
proj_type: side that is projected, "std", "reverse_std", "left" or "right".
refresh: how a basis is found: "warm" (eigendecomposition first, warm-started power iteration from then on), "svd",
    "gram", "randomized" or, for APOLLO, "random".
on_refresh: what becomes of the moments: "keep"; "sign" and "procrustes" turn the new basis to the old one, "rotate"
    turns the moments to the new basis, "reset" begins them anew.
basis: "fp32", or "int4" to keep the basis in half a byte a value.
stagger: spread the refreshes of different matrices over the gap, by their names.
lazy: double a matrix's gap while the last five overlaps of its subspaces average `lazy_threshold`.
compat: "torch", or "authors" for the numerics of the method's own package.
"""


class ComposedOptimizer(MemoryOptimizer):
    """Base of the named optimizers: they choose `rule` and `lift` and the defaults of the options.

    `skipped` counts updates left out because a matrix's gradient was not finite: its weight, moments and basis stay
    as they were, and a refresh that was due is made at the next step. The trainer finds such gradients before any
    optimizer runs; this guards other loops, at the price of one read per matrix from the device.
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
        _require_known(group, "states", tuple(CODECS))
        _require_known(group, "rounding", ROUNDING)
        if "compat" in group:
            _require_known(group, "compat", COMPAT)
        if group.get("rank") is not None:
            self.check_matrix_options(group)
            self._warn_of_cut_ranks(group)

    def check_matrix_options(self, group: Group) -> None:
        """Raise ValueError if the options of a group with a `rank` make no sense."""
        check_subspace(group, self.lift_of(group), self.rule)

    def init_state(self, p: Tensor, group: Group) -> State:
        if isinstance(p, DTensor) and (_projected(p.shape, group) or codec_for(group["states"], p.shape) is not PLAIN):
            raise ValueError(
                f"{self.name_of(p)} is sharded ({p.placements}), and {type(self).__name__} cannot step shards with "
                f"rank={group.get('rank')}, states={group['states']}. Use parallel.zero=0 or optim=adamw."
            )
        if not _projected(p.shape, group):
            return self.rule.new_state(p, p.shape, group)
        return self.matrix_state(p, group)

    def matrix_state(self, p: Tensor, group: Group) -> State:
        """State of a projected matrix."""
        subspace = Subspace(p.shape, group)
        state = self.rule.new_state(p, subspace.low_shape, group) | subspace.new_state(p)
        if LIFTS[self.lift_of(group)].limited:
            state["growth"] = p.new_zeros((), dtype=state_dtype(p.dtype))
        return state

    def update(self, params: list[Tensor], group: Group) -> None:
        plain, projected = [], []
        for p, name in self._named(params, group):
            store = self._store(p, name, group)
            if p in self.reduced:
                self._step_reduced(p, self.reduced.pop(p), store, group)
                continue
            assert p.grad is not None, "update() is given parameters with gradients"
            if _projected(p.shape, group):
                projected.append((Stepped(p, p.grad, self.state[p], store), name))
            else:
                plain.append(Stepped(p, p.grad, self.state[p], store))
        if plain:
            self.rule.step_(plain, group, lr=group["lr"], weight_decay=group["weight_decay"])
        for item, name in projected:
            if not self.step_matrix(item, name, group):
                self.skipped += 1
                log.warning("gradient of %s is not finite: weight and state left as they were", name)

    def step_matrix(self, item: Stepped, name: str, group: Group) -> bool:
        """Step one projected matrix. False, and nothing written, if its gradient is not finite."""
        state, subspace = item.state, Subspace(item.param.shape, group)
        low = self._refresh(item.grad, state, subspace, name) if subspace.due(state) else None
        basis = subspace.basis(state, state_dtype(item.param.dtype))
        if low is None:
            low = project(item.grad, basis, subspace.side)
        # One non-finite element of G makes at least one of R non-finite (0 times inf is NaN), and R is smaller.
        if self.check_finite and not read(torch.isfinite(low.sum()), usual=1.0):
            return False
        LIFTS[self.lift_of(group)].step_(item, self.rule, low, basis, subspace.side, group)
        return True

    def reduces(self, p: Tensor, group: Group) -> bool:
        """Whether the step of `p` is a step on R alone: a linear projection, by a basis that stays this time."""
        if not _projected(p.shape, group) or not LIFTS[self.lift_of(group)].linear:
            return False
        return not Subspace(p.shape, group).due(self.state[p])

    def reduce_(self, p: Tensor, group: Group) -> None:
        """Add R = project(G), in fp32 at least, to `reduced[p]`; free `p.grad`."""
        assert p.grad is not None
        subspace = Subspace(p.shape, group)
        low = project(p.grad, subspace.basis(self.state[p], state_dtype(p.dtype)), subspace.side)
        p.grad = None
        self.reduced[p] = self.reduced[p].add_(low) if p in self.reduced else low

    def _step_reduced(self, p: Tensor, low: Tensor, store: Store, group: Group) -> None:
        subspace = Subspace(p.shape, group)
        basis = subspace.basis(self.state[p], state_dtype(p.dtype))
        item = Stepped(p, low, self.state[p], store)  # a linear way back does not look at the gradient itself
        LIFTS[self.lift_of(group)].step_(item, self.rule, low, basis, subspace.side, group)

    def _refresh(self, grad: Tensor, state: State, subspace: Subspace, name: str) -> Tensor | None:
        return subspace.refresh(grad, state, self.rule.moments, name)

    def _named(self, params: list[Tensor], group: Group) -> list[tuple[Tensor, str]]:
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        known = {id(p): name for p, name in zip(group["params"], names, strict=True)}
        return [(p, known[id(p)]) for p in params]

    def _store(self, p: Tensor, name: str, group: Group) -> Store:
        if p.dtype is not torch.bfloat16 or group["rounding"] == "nearest":
            return Tensor.copy_
        return stochastic(name, self.state[p]["step"], p)

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


def _require_known(group: Group, key: str, known: Sequence[str]) -> None:
    if group[key] not in known:
        raise ValueError(f"{key}={group[key]!r}: must be one of {', '.join(known)}")
