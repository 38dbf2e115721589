"""Other packages' optimizers behind the contract of ours: they do the step, we own what it leaves behind.

The states are made here, as plain tensors and numbers under the package's own names, and lent to an object of the
package for the time of a step. So bytes are known in advance, a checkpoint holds no class of theirs, and a schedule
sets `lr` as everywhere. int8 weights, and bf16 ones with stochastic rounding, are widened to fp32, stepped by the
package and rounded here: two fp32 copies of one parameter at a time, draws keyed by name and step, whatever the package
offers itself.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.base import Group, MemoryOptimizer, State
from optim.int8 import Int8Weight, rounder

SMALLEST = 4096
"""Values from which both packages quantize a tensor."""


class LibraryOptimizer(MemoryOptimizer):
    """Base: a subclass names its package, the tensors of a state and how one tensor is stepped."""

    package = ""
    """Name under which it is installed and imported."""
    kinds: Mapping[str, Any] = {}
    """Its classes that are known here; `kind` of a group is one of them."""

    def __init__(self, params: Any, defaults: Group, rounding: str) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise ValueError(f"{type(self).__name__} needs the package {self.package}: pip install {self.package}")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding={rounding!r}: must be one of nearest, stochastic")
        super().__init__(params, {**defaults, "rounding": rounding})

    def check_options(self, group: Group) -> None:
        if group["kind"] not in self.kinds:
            raise ValueError(f"kind={group['kind']!r}: must be one of {', '.join(self.kinds)}")
        super().check_options(group)

    @classmethod
    def layout(cls, shape: Sequence[int], group: Group) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of the state of a parameter, before there is one."""
        raise NotImplementedError

    def allocate(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> Tensor:
        """Zeros on the device of `p`."""
        return torch.zeros_like(p, dtype=dtype) if shape == tuple(p.shape) else p.new_zeros(shape, dtype=dtype)

    def step_tensor(self, p: Tensor, state: State, group: Group) -> None:
        """Step `p` by `p.grad` in place, and its state; the package counts `step`."""
        raise NotImplementedError

    def init_state(self, p: Tensor, group: Group) -> State:
        if isinstance(p, DTensor):
            raise ValueError(
                f"{self.name_of(p)} is sharded ({p.placements}), and {self.package} lays its blocks over a whole "
                "parameter. Use parallel.zero=0, or an optimizer of stowage such as optim=adamw_8bit."
            )
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{self.name_of(p)} is {p.dtype}, and {self.package} computes in fp32. Use precision=fp32 or bf16, "
                "or optim=adamw."
            )
        found: State = {"step": 0}
        for key, (shape, dtype) in self.layout(p.shape, group).items():
            found[key] = self.allocate(p, shape, dtype, group)
        return found

    @classmethod
    def state_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype = torch.float32) -> int:
        return sum(torch.Size(s).numel() * kind.itemsize for s, kind in cls.layout(shape, group).values())

    def update(self, params: list[Tensor], group: Group) -> None:
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        for p in params:
            state = self.state[p]
            narrow = group["rounding"] == "stochastic" and p.dtype is torch.bfloat16
            if narrow or isinstance(p, Int8Weight):
                assert p.grad is not None, "update() is given parameters with gradients"
                wide = p.detach().float()
                wide.grad = p.grad.float()
                self.step_tensor(wide, state, group)
                rounder(p, names.get(id(p)) or self.name_of(p), state["step"], group["rounding"])(p, wide)
            else:
                self.step_tensor(p, state, group)


def borrowed_step_(worker: torch.optim.Optimizer, p: Tensor, lent: State, options: Group) -> State:
    """Let `worker` step `p` alone, with the state `lent` and `options`; it keeps nothing. Returns the state."""
    worker.param_groups = [{**options, "params": [p]}]
    worker.state[p] = lent
    try:
        worker.step()
        return dict(worker.state[p])
    finally:
        worker.state.clear()
        worker.param_groups = []
