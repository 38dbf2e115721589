"""Host copies of tensors that stand still for now, taken beside the computation and waited for before they change.

Weights and optimizer states do not change from one update to the next. So the copies of a checkpoint leave the device
in the shadow of forward and backward, and the training thread waits for them only before the weights change
(DataStates-LLM, HPDC 2024, arXiv:2406.10707). Three threads take part:

    training    makes the snapshot when the tensors hold what is wanted; calls `wait` before any of them changes
    writing     calls `begin` with the tensors, then `take` for one after the other, then `end`
    copying     that of `Copies`: a stream of its own on CUDA, a thread on CPU

Buffers are those of a pool, used again by the next snapshot. Where its budget is below what is to be copied, the rest
is copied as the writing thread gives buffers back, and `wait` takes that much longer.
"""

import errno
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.pool import Buffer, HostPool
from offload.streams import DONE, Copies, Ticket


@dataclass
class _Copy:
    target: Tensor
    """Of the source's shape and dtype, over the buffer's memory."""
    buffer: Buffer
    ticket: Ticket


class Snapshots:
    """Makes snapshots, one at a time; owns the memory they use.

    Args:
        device: where the tensors are; some may be in host memory besides.
        budget: bytes of host memory at most, or the largest tensor's where that is more; None for no limit.
        delay: seconds every copy is held back, for tests.
    """

    def __init__(self, device: torch.device, budget: int | None = None, *, delay: float = 0.0) -> None:
        self._budget = budget
        self._copies = Copies(device, delay=delay)
        self._pool = HostPool(budget, pinned=device.type == "cuda")
        self.peak = 0
        """Most bytes of host memory held for copies so far, the buffers between two snapshots included."""

    def now(self) -> "Snapshot":
        """Return a snapshot of what tensors hold once all is done that the calling thread has asked for up to now."""
        return Snapshot(self, self._copies.moment())

    def start(self, source: Tensor, moment: Any) -> _Copy | None:
        """Start to copy a contiguous tensor; None where there is no room just now.

        Raises:
            OSError: the machine has no memory left, though the budget would allow for it.
        """
        try:
            buffer = self._pool.take(source.nbytes)
        except (MemoryError, RuntimeError) as error:  # numpy's and torch's ways to say it
            raise OSError(errno.ENOMEM, f"no host memory for a copy of {source.nbytes} bytes") from error
        if buffer is None:
            return None
        self.peak = max(self.peak, self._pool.reserved)
        memory = buffer.memory
        assert memory is not None, "only real tensors are copied"
        if not source.nbytes:
            return _Copy(torch.empty(source.shape, dtype=source.dtype), buffer, DONE)
        raw = memory if isinstance(memory, Tensor) else torch.from_numpy(memory)
        target = raw.view(source.dtype).view(source.shape)
        return _Copy(target, buffer, self._copies.out(bytes_of(source), memory, moment))

    def give(self, copy: _Copy) -> None:
        """Take the memory of a copy back."""
        self._pool.give(copy.buffer)

    def make_room_for(self, largest: int) -> None:
        """See that a tensor of `largest` bytes can be copied at all."""
        if self._budget is not None:
            self._pool.budget = max(self._budget, largest)


class Snapshot:
    """Copies of some tensors. See the head of the file for who calls what."""

    def __init__(self, owner: Snapshots, moment: Any) -> None:
        self._owner, self._moment = owner, moment
        self._waiting: deque[Tensor] = deque()
        self._copies: deque[_Copy] = deque()
        self._taken: _Copy | None = None
        self._held: list[Tensor] = []
        """What is being copied: its memory may be nobody else's any more."""
        self._last: Ticket | None = None
        self._all_begun = threading.Event()
        self.nbytes = 0
        """Bytes to be copied; known once it has begun."""

    @torch.no_grad()
    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Start to copy `tensors` (plain ones, of any device), as many as there is room for."""
        self._waiting = deque(tensors)
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self._owner.make_room_for(max((tensor.nbytes for tensor in tensors), default=0))
        self._go_on()

    @torch.no_grad()
    def take(self) -> Tensor:
        """Return the copy of the next tensor, in the order of `begin`; it is good until the next call.

        Raises:
            Exception: what went wrong when it was copied.
        """
        if self._taken is not None:
            self._owner.give(self._taken)
            self._taken = None
            self._go_on()
        self._taken = self._copies.popleft()
        self._taken.ticket.wait()  # which raises
        self._taken.ticket.finish()
        return self._taken.target

    def end(self) -> None:
        """Give everything back: all is written, or nothing more will be."""
        self._waiting.clear()
        for copy in [*([self._taken] if self._taken else []), *self._copies]:
            self._owner.give(copy)  # one still under way is over before the next into the same buffer begins
        self._taken = None
        self._copies.clear()
        self._all_begun.set()

    def wait(self) -> None:
        """Return when the tensors may change: all are copied, or nobody wants the copies any more.

        An error of a copy is the writing thread's to tell.
        """
        self._all_begun.wait()
        if self._last is not None:
            self._last.finish()  # copies are done in order
        self._held.clear()

    def _go_on(self) -> None:
        while self._waiting:
            source, moment = self._waiting[0], self._moment
            if not source.is_contiguous():
                source, moment = source.contiguous(), None  # made by this thread, which the copy then comes after
            copy = self._owner.start(source, moment)
            if copy is None:
                return
            self._waiting.popleft()
            self._held.append(source)
            self._copies.append(copy)
            self._last = copy.ticket if source.nbytes else self._last
        self._all_begun.set()


def bytes_of(tensor: Tensor) -> Tensor:
    """(n,) bytes of a contiguous tensor, as a view."""
    return tensor.detach().reshape(-1).view(torch.uint8)
