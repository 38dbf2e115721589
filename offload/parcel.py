"""One parameter's optimizer state as one stretch of bytes that leaves the device and comes back.

All tensors of the state become views of one storage, in the same shapes and strides; it shrinks to nothing while the
bytes are away and grows again before they return. So whoever holds a tensor of the state, a DTensor's local part for
instance, still holds it after the journey, and a journey is one copy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from offload.pool import ALIGN, Ledger, TierLost
from offload.streams import Ticket
from offload.tiers import Room
from optim.residency import State
from parallel.dtensor import Layout, with_part


class Parcel:
    """The tensors of a state, all on one device, in one storage; here until a room is given for them."""

    def __init__(self, name: str, state: State) -> None:
        self.name = name
        self.state = state
        tensors = [part_of(value) for value in state.values() if isinstance(value, Tensor)]
        self.rank_bytes = sum(rank_bytes(value) for value in state.values() if isinstance(value, Tensor))
        """The same on every rank, though shards may be uneven."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        starts: dict[int, int] = {}
        end = 0
        for key, storage in storages.items():
            starts[key] = end
            end += -(-storage.nbytes() // ALIGN) * ALIGN
        device = tensors[0].device if tensors else torch.device("cpu")
        self.bytes = torch.empty(end, dtype=torch.uint8, device=device)
        self._storage = self.bytes.untyped_storage()
        for key, storage in storages.items():
            self.bytes[starts[key] : starts[key] + storage.nbytes()].copy_(bytes_of(storage))
        for tensor in tensors:
            start = starts[tensor.untyped_storage()._cdata] // tensor.itemsize
            tensor.set_(self._storage, start + tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]
        self.nbytes = end
        self.room: Room | None = None
        """Where the bytes go; None: they stay here."""
        self.here = True
        self._coming: Ticket | None = None
        self._leaving: Ticket | None = None

    def fetch(self, ledger: Ledger) -> None:
        """Begin to bring the bytes back, unless they are here."""
        if self.room is not None and not self.here:
            self.here = True
            self._storage.resize_(self.nbytes)
            self._coming = self.room.get(self.bytes)
            ledger.back[self.room.tier] += self.nbytes

    def arrive(self) -> None:
        """Let nothing that follows run before the bytes are here.

        Raises:
            TierLost: they cannot be read.
        """
        ticket, self._coming = self._coming, None
        if ticket is None:
            return
        try:
            ticket.wait()
        except OSError as error:
            raise TierLost(
                f"the optimizer state of {self.name} cannot be read back: {error}. Training cannot go on",
                "Use another offload.disk_dir, or offload.states=host",
            ) from error

    def send(self, ledger: Ledger) -> None:
        """Begin to write the bytes to their room; they stay valid here until `let_go`."""
        if self.room is not None:
            self._leaving = self.room.put(self.bytes)
            ledger.out[self.room.tier] += self.nbytes

    def written(self) -> None:
        """Wait for a copy out that has begun.

        Raises:
            OSError: it failed; the bytes are still here, whole.
        """
        ticket, self._leaving = self._leaving, None
        if ticket is not None:
            ticket.wait()

    def let_go(self) -> None:
        """Free the bytes here, once a copy out that has begun is done. Raises as `written` does."""
        if self.room is None or not self.here:
            return
        self.written()
        self.arrive()  # of bytes that were fetched for nothing
        self.room.settled()
        self.here = False
        self._storage.resize_(0)

    def stay(self) -> None:
        """Keep the bytes here from now on, and give the room back."""
        if self.room is not None:
            room, self.room = self.room, None
            room.close()

    def discard(self) -> None:
        """Free the bytes here for good, where the run is about to be refused."""
        self.here = False
        self._storage.resize_(0)

    def readable(self) -> dict[str, Any]:
        """The state with tensors on what its room holds."""
        if self.here or self.room is None:
            return dict(self.state)
        view = self.room.view().untyped_storage()
        return {key: seen_in(view, value) if isinstance(value, Tensor) else value for key, value in self.state.items()}


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A storage as (n,) uint8."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))  # type: ignore[call-overload,no-any-return]


def part_of(tensor: Tensor) -> Tensor:
    """The very tensor that holds a DTensor's part here; a plain one itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def seen_in(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """A tensor like `tensor`, at the same place of another storage."""
    if isinstance(tensor, DTensor):
        return with_part(tensor, seen_in(storage, part_of(tensor)))
    made = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return made.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload,no-any-return]


def rank_bytes(tensor: Tensor) -> int:
    """Bytes of a rank's part of a tensor, or of the largest part."""
    whole = tensor.numel() * tensor.itemsize
    return -(-whole // Layout.of(tensor).count) if isinstance(tensor, DTensor) else whole
