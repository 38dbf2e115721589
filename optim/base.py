"""What every optimizer of this package shares.

An algorithm says which state a parameter has (`init_state`), how a list of parameters steps (`update`) and how
many bytes that takes (`state_bytes`). The base does the rest once: the closure, the refusal of sparse gradients,
states made at construction (so that a checkpoint always holds them and needs no fake step), and loading without
torch's cast of every state to its parameter's dtype.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optim.residency import Group as Group
from optim.residency import Residency, keeper
from optim.residency import State as State
from optim.sharded import copy_whole_

CHUNK = 2**22
"""Values of a low-precision tensor that are held in fp32 at a time (16 MiB)."""
CUDA_CHUNK = 2**24
"""The same on CUDA (64 MiB), where each piece is a few kernels to be launched."""


def piece(tensor: Tensor) -> int:
    """Values of a tensor that are widened at a time, where it is."""
    return CUDA_CHUNK if tensor.is_cuda else CHUNK


@functools.cache
def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and arithmetic for weights of `dtype`: at least fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def is_pretended(tensor: Tensor) -> bool:
    """Whether a tensor, fake or on the meta device, has no values: a step with it is a prediction."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def read(scalar: Tensor, usual: float) -> float:
    """Read a scalar from its device; waits for the device.

    A pretended tensor has no value: there the `usual` one is taken, so that a step can be predicted.
    """
    return usual if is_pretended(scalar) else float(scalar)


class MemoryOptimizer(torch.optim.Optimizer):
    """Base class: an optimizer whose state, dtype and bytes are known from a parameter's global shape."""

    check_finite = True
    """Whether an update looks for non-finite gradients itself, which reads from the device once a matrix. A loop that
    has looked already, as ours does at the global norm, sets it to False."""

    shard_group: dist.ProcessGroup | None = None
    """Process group for what the ranks that share a parameter tell each other, where it must not be the mesh's own:
    in hooks that run while that is busy with gradients. It has the same ranks in the same order."""

    def __init__(self, params: Any, defaults: Group) -> None:
        self.reduced: dict[Tensor, Tensor] = {}
        """What `reduce_` has kept of gradients, until their parameter steps; empty between two steps."""
        self.residency = keeper()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.reduced = {}  # torch copies and pickles groups and states alone
        self.residency = getattr(self, "residency", None) or Residency()  # a load comes through here too

    def check_options(self, group: Group) -> None:
        """Raise ValueError if a group's hyper-parameters make no sense."""
        if not group["lr"] >= 0:
            raise ValueError(f"lr={group['lr']}: must be at least 0")
        if "betas" in group and not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
            raise ValueError(f"betas={group['betas']}: needs two numbers in [0, 1), such as (0.9, 0.999)")
        if "eps" in group and not group["eps"] >= 0:
            raise ValueError(f"eps={group['eps']}: must be at least 0, such as 1e-8")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"weight_decay={group['weight_decay']}: must be at least 0")

    def init_state(self, p: Tensor, group: Group) -> State:
        """Make the state of one parameter before its first step."""
        raise NotImplementedError

    def update(self, params: list[Tensor], group: Group) -> None:
        """Step parameters of one group, each with a dense gradient, in place; gradients are only read.

        The result for a parameter does not depend on which others are in the list.
        """
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of all state tensors of one parameter with global `shape` and weights of `dtype`."""
        raise NotImplementedError

    def reduced_bytes(self, p: Tensor, group: Group) -> int | None:
        """Bytes of what most steps of `p` need of its gradient, if that is a linear projection; None: all of it."""
        return None

    def reduces(self, p: Tensor, group: Group) -> bool:
        """Whether the next step of `p` needs no more of its gradient than `reduce_` keeps."""
        return False

    def reduce_(self, p: Tensor, group: Group) -> None:
        """Add what the next step needs of `p.grad` to `reduced[p]`, and free `p.grad`.

        Only where `reduces` says so. Linear in the gradient, so that sums over micro-steps and ranks are exact.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step_one(self, p: Tensor, group: Group) -> None:
        """Step one parameter of `group` as `step` would, with `p.grad` or `reduced[p]`; without hooks or checks."""
        self._require_state(p, group)
        with self.residency.here(p):
            self.update([p], group)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, check its options and make the states of its trainable parameters."""
        self._refuse_repeated(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self.check_options(group)
        for p in group["params"]:
            if p.requires_grad:
                self._require_state(p, group)
        self.residency.rest()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient; return the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        asked = []
        for group in self.param_groups:
            self.refuse_sparse(group["params"])
            params = [p for p in group["params"] if self.residency.has_gradient(p)]
            for p in params:
                self._require_state(p, group)  # of one unfrozen since construction
            if params:
                asked.append((group, params))
        for group, params in self.residency.batches(asked, self.state):
            with self.residency.stepping():
                self.update(params, group)
        return loss

    def _require_state(self, p: Tensor, group: Group) -> None:
        if p not in self.state:
            self.state[p] = self.init_state(p, group)
            self.residency.admit(p, self.state[p])

    def state_dict(self) -> dict[str, Any]:
        """As torch's; states that are off the device are seen where they lie."""
        held, self.state = self.state, self._seen_states()
        try:
            return super().state_dict()
        finally:
            self.state = held

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self._seen_states()}

    def _seen_states(self) -> defaultdict[Tensor, Any]:
        return defaultdict(dict, {p: self.residency.readable(p, state) for p, state in self.state.items()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the states already held, each in its own dtype and on its own device.

        torch casts a state to its parameter's dtype, which would round fp32 moments of bf16 weights and turn uint8
        codes into floats. Options the saved groups lack take their defaults.

        Raises:
            ValueError: a saved state does not fit (another optimizer, rank or model).
        """
        held = self.state
        pairs: list[tuple[Tensor, State]] = []

        def withhold(_: torch.optim.Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            ids = [i for group in incoming["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            saved = incoming["state"]
            # Unequal lengths are torch's to refuse, right after this hook.
            pairs.extend((p, saved[i]) for i, p in zip(ids, params, strict=False) if i in saved and p in held)
            for p, state in pairs:
                self._check_fits(p, held[p], state)
            return {**incoming, "state": {}}

        def fill(_: torch.optim.Optimizer) -> None:
            self.state = held
            for p, state in pairs:
                with self.residency.here(p):
                    _copy_state(held[p], state)
            self.residency.rest()
            for group in self.param_groups:
                for key, default in self.defaults.items():
                    group.setdefault(key, default)

        # As hooks around the user's own: theirs see the whole state dict before and the whole state after.
        hooks = [
            self.register_load_state_dict_pre_hook(withhold),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def name_of(self, p: Tensor) -> str:
        """The name given for a parameter, or its place and shape where none was."""
        for index, group in enumerate(self.param_groups):
            for place, other in enumerate(group["params"]):
                if other is p:
                    names = group.get("param_names")
                    return names[place] if names else f"parameter {place} of group {index}, shape {tuple(p.shape)}"
        raise KeyError("not a parameter of this optimizer")

    def _refuse_repeated(self, param_group: Group) -> None:
        """torch refuses too, but says neither which nor what to do."""
        given = param_group["params"]
        if isinstance(given, Tensor):
            return
        param_group["params"] = given = list(given)  # a generator is read once
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        held = {id(p): p for group in self.param_groups for p in group["params"]}
        seen: set[int] = set()
        for place, p in enumerate(tensors):
            if id(p) in held:
                raise ValueError(f"{self.name_of(held[id(p)])} is in two groups; leave it out of one")
            if id(p) in seen:
                where = f"parameter {place} of group {len(self.param_groups)}, shape {tuple(p.shape)}"
                raise ValueError(f"{where}, is there twice; leave one out")
            seen.add(id(p))

    def refuse_sparse(self, params: list[Tensor]) -> None:
        """Raise ValueError if one of the gradients is not dense."""
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"{type(self).__name__} needs dense gradients, but that of {self.name_of(p)} is {p.grad.layout}. "
                    "Build the embedding with sparse=False, or give it to torch.optim.SparseAdam."
                )

    def _check_fits(self, p: Tensor, held: State, saved: State) -> None:
        """Compare before anything is written, so that a refused load changes nothing."""
        missing = [key for key, value in held.items() if key not in saved and isinstance(value, Tensor)]
        wrong = [key for key in held if key in saved and not _fits(held[key], saved[key])]
        if missing or wrong:
            raise ValueError(
                f"saved state of {self.name_of(p)} does not fit in: {', '.join(missing + wrong)}. "
                f"Saved is {_layout(saved)}; {type(self).__name__} holds {_layout(held)}. "
                "Load it with the optimizer and the options (such as rank) that it was saved with."
            )


def contiguous_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory layout of `like`; itself where it has it already.

    Fused kernels walk raw memory: a gradient laid out otherwise than its weight would be applied to the wrong
    elements without an error (tried with torch 2.13 on CPU).
    """
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _copy_state(held: State, saved: State) -> None:
    for key, value in held.items():
        if key not in saved:
            continue  # a number added since the checkpoint was written
        if isinstance(value, Tensor):
            copy_whole_(value, saved[key])
        else:
            held[key] = type(value)(saved[key])


def _fits(held: Any, saved: Any) -> bool:
    if not isinstance(held, Tensor):
        return not isinstance(saved, Tensor) or saved.numel() == 1  # torch keeps `step` in a tensor
    if not isinstance(saved, Tensor) or saved.shape != held.shape:
        return False
    return saved.dtype == held.dtype or (saved.is_floating_point() and held.is_floating_point())


def _layout(state: State) -> str:
    return ", ".join(
        f"{key} {'x'.join(map(str, value.shape))}" for key, value in state.items() if isinstance(value, Tensor)
    )
