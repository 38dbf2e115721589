"""One storage that autograd saved, and where its bytes are until backward asks for them.

Autograd holds handles (`Saved`), one for each time it saved a view of the storage; the handles hold the storage's
`Entry`, and nothing else does. So when backward has used the last of them, or the graph is dropped, the entry dies, and
with it what it holds near and far.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload.compress import Codes, decode
from offload.config import Fate
from offload.pool import Ledger, TierLost
from offload.streams import Ticket
from offload.tiers import Room

watchers: list[Callable[[Tensor], Any]] = []
"""Called with every tensor that an entry holds near: the meter learns from them what autograd does not hold itself."""


def hold(tensor: Tensor) -> Tensor:
    """Tell those who watch that `tensor` is held for backward from now on."""
    for watcher in watchers:
        watcher(tensor)
    return tensor


class Frame:
    """One run of one block: what it saved that is not simply kept."""

    def __init__(self, index: int, previous: Frame | None) -> None:
        self.index, self.previous = index, previous
        self.entries: list[weakref.ref[Moved]] = []
        self.moved = self.kept = 0
        """Bytes that go to a tier, and that stay as they are, each storage once."""
        self._started = False

    def alive(self) -> list[Moved]:
        """Moved entries that backward still needs."""
        return [entry for ref in self.entries if (entry := ref()) is not None]

    def settle(self) -> None:
        """Wait until what this block saved has left, and let go of it."""
        for entry in self.alive():
            entry.settle()

    def begin_backward(self) -> None:
        """Bring back what this block saved, and the one before it while this one's backward runs."""
        if self._started:
            return
        self._started = True
        for frame in (self, self.previous):
            if frame is not None:
                for entry in reversed(frame.alive()):
                    entry.start_back()
        self.previous = None


class Entry:
    """A storage. `fate` says what became of it; `version` what it had been written how often when it was saved."""

    fate: Fate

    def __init__(self, storage: torch.UntypedStorage, version: int) -> None:
        self._storage, self._version = weakref.ref(storage), version

    def is_of(self, storage: torch.UntypedStorage, version: int) -> bool:
        """Whether it is this very storage, unchanged since; its address alone may have gone to another."""
        return self._storage() is storage and self._version == version

    def flat(self) -> Tensor:
        """The whole storage, (n,) of uint8 or of the dtype it was encoded from."""
        raise NotImplementedError


class Moved(Entry):
    """Bytes in a tier."""

    def __init__(
        self, storage: torch.UntypedStorage, version: int, frame: Frame, near: Tensor, room: Room, ledger: Ledger,
        fate: Fate, failed: Callable[[OSError], None],
    ) -> None:  # fmt: skip
        super().__init__(storage, version)
        self.fate, self.frame = fate, frame
        self._near: Tensor | None = hold(near)
        self._shape, self._device = near.shape, near.device
        self._room: Room | None = room
        self._ledger, self._failed = ledger, failed
        self._leaving: Ticket | None = room.put(near)
        self._coming: Ticket | None = None
        ledger.out[room.tier] += near.nbytes

    def settle(self) -> None:
        """Wait for the copy out and let go of the bytes near; where it failed, they stay near."""
        if self._leaving is None or self._room is None:
            return
        ticket, self._leaving = self._leaving, None
        try:
            ticket.wait()
        except OSError as error:
            tier, size = self._room.tier, self._shape.numel()
            self._ledger.out[tier] -= size
            self._ledger.refused[tier] += size
            self._close()
            self._failed(error)
            return
        self._room.settled()
        self._near = None

    def start_back(self) -> None:
        """Begin to bring the bytes back, unless they are here still."""
        if self._near is not None or self._room is None:
            return
        self._near = hold(torch.empty(self._shape, dtype=torch.uint8, device=self._device))
        self._coming = self._room.get(self._near)
        self._ledger.back[self._room.tier] += self._near.nbytes

    def flat(self) -> Tensor:
        self.frame.begin_backward()
        self.start_back()
        assert self._near is not None
        if self._leaving is not None and self._room is not None:  # asked for before it left
            self._ledger.forwarded[self._room.tier] += self._near.nbytes
            self._ledger.back[self._room.tier] += self._near.nbytes
            self._leaving = None  # the room waits for the copy when it closes
        if self._coming is not None:
            ticket, self._coming = self._coming, None
            try:
                ticket.wait()
            except OSError as error:
                raise TierLost(
                    f"an activation cannot be read back: {error}. Training cannot go on",
                    "Use another activations.disk_dir, or activations=recompute",
                ) from error
        return self._near

    def _close(self) -> None:
        if self._room is not None:
            room, self._room = self._room, None
            room.close()

    def __del__(self) -> None:
        self._close()


class Compressed(Entry):
    """Codes; decoded when backward asks, once for all who saved a view."""

    def __init__(self, storage: torch.UntypedStorage, version: int, codes: Codes, fate: Fate, ledger: Ledger) -> None:
        super().__init__(storage, version)
        self.fate = fate
        self._codes = codes
        self._decoded: Tensor | None = None
        hold(codes.codes)
        hold(codes.scales)
        ledger.compressed += codes.codes.numel() * codes.dtype.itemsize
        ledger.codes += codes.nbytes

    def flat(self) -> Tensor:
        if self._decoded is None:
            self._decoded = hold(decode(self._codes))
        return self._decoded


class Saved:
    """What autograd holds in place of a tensor: the entry of its storage, and which view of it."""

    __slots__ = ("dtype", "entry", "offset", "shape", "stride")

    def __init__(self, entry: Entry, tensor: Tensor) -> None:
        self.entry = entry
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()

    def tensor(self) -> Tensor:
        """The tensor as it was saved: views of one storage are views of one storage again."""
        flat = self.entry.flat()
        if flat.dtype is not self.dtype:
            flat = flat.view(self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)
