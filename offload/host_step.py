"""The optimizer's step on the host: states never leave it; gradients come, and weights go back.

    leaving (gradients)    w1 | w2 | w3 |
    host                      | step w1 | step w2 | step w3 |
    coming (weights)                    |    w1   |    w2   | w3

In a parameter's place steps its twin in host memory, with its state where that lies and its gradient as it came. So it
is the optimizer's own step, of any optimizer, by the kernels of a CPU (torch's fused ones where it has them), and equal
to the bit to that of an optimizer on the CPU. With `offload.gradients` the gradients are there when backward ends. What
ranks tell each other in a step they tell over gloo.

ZeRO-Offload (Ren et al. 2021, arXiv:2101.06840). Over the link go a gradient and a weight, where `states.py` sends all
of a state both ways: for fp32 AdamW half the bytes, for states of 8 bits more of them. The price is the host's memory,
of which a step of AdamW reads and writes 28 bytes a weight. `benchmarks/optimizer_offload.py` has both.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from offload.config import OffloadConfig, StepPlace
from offload.gradients import values
from offload.parcel import part_of
from offload.pool import Buffer, HostPool, Ledger
from offload.states import OffloadedStates, Window
from offload.streams import Copies, Ticket
from optim.int8 import Int8Weight
from optim.residency import Group, State
from parallel.dtensor import local, with_part
from parallel.spread import stored


@dataclass
class Twin:
    """A parameter's weight in host memory."""

    buffers: list[Buffer]
    """One for each plain tensor that this rank's part is made of."""
    tensor: Tensor | None = None
    """Of the parameter's kind, over the buffers; made once, since optimizers know by it what never changes."""
    versions: list[int] = field(default_factory=list)
    """How often each of those had been written when the twin was last the same."""


@dataclass
class Leaving:
    """A gradient on its way to the host, and the memory here that it is copied from."""

    near: Tensor
    buffer: Buffer
    ticket: Ticket | None


class HostStep(OffloadedStates):
    """States in host memory, stepped with there. Arguments as of its base."""

    def __init__(self, cfg: OffloadConfig, device: torch.device, *, copies: Copies | None = None) -> None:
        super().__init__(cfg, device, copies=copies)
        pinned = device.type == "cuda"
        self._weights, self._passing = HostPool(pinned=pinned), HostPool(pinned=pinned)
        self._weights_ledger, self._passing_ledger = Ledger(), Ledger()
        self._twins: dict[Tensor, Twin] = {}
        self._groups: dict[int, Group] = {}
        """By the identity of a group, the one that lists twins in the place of its parameters."""
        self._underway: dict[Tensor, Leaving] = {}
        self._twins_step = False

    @property
    def ledgers(self) -> dict[str, Ledger]:
        passing = {"gradients_": self._passing_ledger} if self.gradients is None else {}
        return super().ledgers | passing | {"weights_": self._weights_ledger}

    def admit(self, p: Tensor, state: State) -> None:
        super().admit(p, state)
        if not self._parcels[p].rank_bytes:
            return  # on no rank a state: nothing would be gained
        parts = stored(local(p))
        for part in parts:
            if not part.is_contiguous():
                raise ValueError(
                    f"offload.step=host: a weight of shape {tuple(part.shape)} has strides {part.stride()}, and only "
                    "contiguous ones go to the host and back. Use offload.step=device."
                )
        self._twins[p] = Twin([self._borrow(self._weights, self._weights_ledger, part) for part in parts])

    def stepping(self) -> AbstractContextManager[object]:
        """What twins' step takes is no memory of the device, and is not counted there."""
        return _disable_current_modes() if self._twins_step else nullcontext()

    @torch.no_grad()
    def batches(self, asked: list[Window], states: MutableMapping[Tensor, State]) -> Iterator[Window]:
        self.require_room()
        self.rest()
        if self.gradients is not None:
            self.gradients.arrive_all()
        # all ranks come to the same two lists
        here = [(group, [p for p in params if p not in self._twins]) for group, params in asked]
        yield from super().batches([window for window in here if window[1]], states)
        there = [(group, [p for p in params if p in self._twins]) for group, params in asked]
        windows = list(self._windows([window for window in there if window[1]]))
        coming: list[Ticket] = []
        for _, params in windows[:1]:
            self._call(params)
        for (group, params), following in zip_longest(windows, windows[1:]):
            if following is not None:
                self._call(following[1])
            if all(buffer.memory is not None for p in params for buffer in self._twins[p].buffers):
                yield from self._step(group, params, states)
            for p in params:
                self._release(p)
                coming += self._copy_back(p)
        for ticket in coming:
            ticket.wait()
        for p in (p for _, params in windows for p in params):
            self._twins[p].versions = versions(p)

    def _step(self, group: Group, params: list[Tensor], states: MutableMapping[Tensor, State]) -> Iterator[Window]:
        with _disable_current_modes():
            stepped, twins = self._group(group), {p: self._twin(p) for p in params}
            for p, twin in twins.items():
                self._renew(p)
                grad = self._gradient(p)
                twin.grad = with_part(p, grad) if isinstance(p, DTensor) else grad
                states[twin] = {key: on_host(value) for key, value in self._parcels[p].readable().items()}
        self._twins_step = True
        try:
            yield stepped, list(twins.values())
        finally:
            self._twins_step = False
            for p, twin in twins.items():
                twin.grad = None
                numbers = {key: value for key, value in states.pop(twin).items() if not isinstance(value, Tensor)}
                self._parcels[p].state.update(numbers)

    def _group(self, group: Group) -> Group:
        """The group that lists twins, with the options of `group` as they are now; the same one in every step."""
        listed = [self._twin(p) for p in group["params"]]
        found = self._groups.get(id(group))
        if found is None or list(map(id, found["params"])) != list(map(id, listed)):
            found = self._groups[id(group)] = {"params": listed}
        found.update({key: value for key, value in group.items() if key != "params"})
        return found

    # --- gradients ---

    def _call(self, params: list[Tensor]) -> None:
        """Begin to send gradients to the host, if they have not been there since backward."""
        for p in params:
            if p.grad is None:
                continue
            near = bytes_in(local(p.grad).contiguous())
            buffer = self._borrow(self._passing, self._passing_ledger, near)
            self._passing_ledger.out["host"] += buffer.nbytes
            self._underway[p] = Leaving(near, buffer, self._copy_out(near, buffer))

    def _gradient(self, p: Tensor) -> Tensor:
        """This rank's part, on the host."""
        leaving = self._underway.get(p)
        if leaving is None:
            assert self.gradients is not None, "a parameter steps with a gradient"
            return self.gradients.there(p)
        if leaving.ticket is not None:
            leaving.ticket.finish()
        assert p.grad is not None
        grad = local(p.grad)
        return values(leaving.buffer, grad.dtype).view(grad.shape)

    def _release(self, p: Tensor) -> None:
        leaving = self._underway.pop(p, None)
        if leaving is not None:
            self._passing.give(leaving.buffer)
            self._passing_ledger.hold("host", -leaving.buffer.nbytes)
        elif self.gradients is not None:
            self.gradients.release(p)

    # --- weights ---

    def _twin(self, p: Tensor) -> Tensor:
        """What steps in the place of `p`: its twin, or itself where it has none."""
        twin = self._twins.get(p)
        if twin is None:
            return p
        if twin.tensor is None:
            part = local(p)
            plain = zip(stored(part), twin.buffers, strict=True)
            made = iter([values(buffer, near.dtype).view(near.shape) for near, buffer in plain])
            tensor = part.like(lambda _: next(made)) if isinstance(part, Int8Weight) else next(made)
            twin.tensor = with_part(p, tensor) if isinstance(p, DTensor) else tensor
        return twin.tensor

    def _renew(self, p: Tensor) -> None:
        """Copy a weight to its twin where others have written to it: at first, and when a checkpoint was loaded."""
        twin = self._twins[p]
        if twin.versions != versions(p):
            for near, buffer in zip(stored(local(p)), twin.buffers, strict=True):
                ticket = self._copy_out(bytes_in(near), buffer)
                if ticket is not None:
                    ticket.finish()

    def _copy_out(self, near: Tensor, buffer: Buffer) -> Ticket | None:
        return self._copies.out(near, buffer.memory) if buffer.memory is not None and buffer.nbytes else None

    def _copy_back(self, p: Tensor) -> list[Ticket]:
        """Begin to send a weight back to where it computes."""
        pairs = zip(stored(local(p)), self._twins[p].buffers, strict=True)
        return [
            self._copies.back(buffer.memory, bytes_in(near))
            for near, buffer in pairs
            if buffer.memory is not None and buffer.nbytes
        ]

    @staticmethod
    def _borrow(pool: HostPool, ledger: Ledger, like: Tensor) -> Buffer:
        buffer = pool.take(like.nbytes, fake=isinstance(like, FakeTensor))
        assert buffer is not None, "the pool has no budget"
        ledger.hold("host", like.nbytes)
        return buffer


def states_away(cfg: OffloadConfig, device: torch.device, copies: Copies | None = None) -> OffloadedStates:
    """What keeps the states of an optimizer that steps on `device` where `cfg` says."""
    kind = HostStep if cfg.step is StepPlace.host else OffloadedStates
    return kind(cfg, device, copies=copies)


def bytes_in(tensor: Tensor) -> Tensor:
    """(n,) bytes of a contiguous tensor, as a view."""
    return tensor.detach().view(-1).view(torch.uint8)


def versions(p: Tensor) -> list[int]:
    """How often the tensors were written in place that this rank's part of `p` is made of."""
    return [part._version for part in stored(local(p))]


def on_host(value: Any) -> Any:
    """An empty shard's state, which has no room, beside those that have."""
    if not isinstance(value, Tensor):
        return value
    part = part_of(value).cpu()
    return with_part(value, part) if isinstance(value, DTensor) else part
