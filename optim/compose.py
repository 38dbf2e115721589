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
from torch.distributed.tensor import DTensor

from optim.base import Group, MemoryOptimizer, State, read, state_dtype
from optim.codec import CODECS, PLAIN, codec_for
from optim.lift import LIFTS
from optim.projection import low_shape, project, side_of
from optim.rounding import Store, seed_of, stochastic
from optim.rules import Adam, Rule, Stepped
from optim.subspace import Subspace, check_subspace

log = logging.getLogger(__name__)

ROUNDING = ("nearest", "stochastic")


class ComposedOptimizer(MemoryOptimizer):
    """Base of the named optimizers: they choose `rule` and `lift` and the defaults of the options.

    `skipped` counts updates left out because a matrix's gradient was not finite: its weight, moments and basis stay
    as they were, and a refresh that was due is made at the next step. The trainer finds such gradients before any
    optimizer runs; this guards other loops, at the price of one read per matrix from the device.
    """

    rule: Rule = Adam()
    lift: str = "back"
    skipped: int = 0

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        _require_known(group, "states", tuple(CODECS))
        _require_known(group, "rounding", ROUNDING)
        if group.get("rank") is not None:
            check_subspace(group, self.lift, self.rule)
            self._warn_of_cut_ranks(group)

    def init_state(self, p: Tensor, group: Group) -> State:
        if isinstance(p, DTensor) and (_projected(p.shape, group) or codec_for(group["states"], p.shape) is not PLAIN):
            raise ValueError(
                f"{self.name_of(p)} is sharded ({p.placements}), and {type(self).__name__} cannot step shards with "
                f"rank={group.get('rank')}, states={group['states']}. Use parallel.zero=0 or optim=adamw."
            )
        if not _projected(p.shape, group):
            return self.rule.new_state(p, p.shape, group)
        subspace = Subspace(p.shape, group)
        state = self.rule.new_state(p, subspace.low_shape, group) | subspace.new_state(p)
        if LIFTS[self.lift].limited:
            state["growth"] = p.new_zeros((), dtype=state_dtype(p.dtype))
        return state

    def update(self, params: list[Tensor], group: Group) -> None:
        plain, projected = [], []
        for p, name in self._named(params, group):
            assert p.grad is not None, "update() is given parameters with gradients"
            store = self._store(p, name, group)
            if _projected(p.shape, group):
                projected.append((Stepped(p, p.grad, self.state[p], store), name))
            else:
                plain.append(Stepped(p, p.grad, self.state[p], store))
        if plain:
            self.rule.step_(plain, group, lr=group["lr"], weight_decay=group["weight_decay"])
        for item, name in projected:
            if not self._step_projected(item, name, group):
                self.skipped += 1
                log.warning("gradient of %s is not finite: weight and state left as they were", name)

    def _step_projected(self, item: Stepped, name: str, group: Group) -> bool:
        """Step one matrix. False, and nothing written, if its gradient is not finite."""
        state, subspace = item.state, Subspace(item.param.shape, group)
        if subspace.due(state):
            self._refresh(item.grad, state, subspace, name)
        basis = subspace.basis(state, state_dtype(item.param.dtype))
        low = project(item.grad, basis, subspace.side)
        # One non-finite element of G makes at least one of R non-finite (0 times inf is NaN), and R is smaller.
        if self.check_finite and not read(torch.isfinite(low.sum()), usual=1.0):
            return False
        LIFTS[self.lift].step_(item, self.rule, low, basis, subspace.side, group)
        return True

    def _refresh(self, grad: Tensor, state: State, subspace: Subspace, name: str) -> None:
        subspace.refresh(grad, state, self.rule.moments, name)

    def _named(self, params: list[Tensor], group: Group) -> list[tuple[Tensor, str]]:
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        known = {id(p): name for p, name in zip(group["params"], names, strict=True)}
        return [(p, known[id(p)]) for p in params]

    def _store(self, p: Tensor, name: str, group: Group) -> Store:
        if p.dtype is not torch.bfloat16 or group["rounding"] == "nearest":
            return Tensor.copy_
        return stochastic(name, self.state[p]["step"], p.device)

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
        subspace = Subspace(shape, group)
        growth = state_dtype(dtype).itemsize if LIFTS[cls.lift].limited else 0
        return cls.rule.state_bytes(subspace.low_shape, group, dtype) + subspace.state_bytes(dtype) + growth


def _projected(shape: Sequence[int], group: Group) -> bool:
    return group.get("rank") is not None and len(shape) == 2


def _require_known(group: Group, key: str, known: Sequence[str]) -> None:
    if group[key] not in known:
        raise ValueError(f"{key}={group[key]!r}: must be one of {', '.join(known)}")
