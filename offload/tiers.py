"""Where moved bytes wait: in host memory, or in a file that has no name.

Both answer the same calls. Making one takes the room, or says that there is none; `put` starts the copy out; `get`
starts the copy back; `settled` says that both were waited for; `view` shows the bytes where they lie; `close` gives the
room back, whatever is under way. All memory near is (n,) uint8, and the caller's.
"""

import contextlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from offload.pool import Buffer, HostPool, Ledger, TierFull
from offload.streams import DONE, Copies, Ticket


class Room(Protocol):
    """The place of one storage in a tier."""

    tier: str

    def put(self, near: Tensor) -> Ticket: ...
    def get(self, near: Tensor) -> Ticket: ...
    def settled(self) -> None: ...
    def view(self) -> Tensor: ...
    def close(self) -> None: ...


def no_room(option: str, budget: int | None, nbytes: int, taken: int) -> TierFull:
    return TierFull(
        f"{option}={(budget or 0) / 2**30:.3g} has no room for {nbytes:,} bytes more ({taken:,} are taken)",
        f"Use a larger {option}",
    )


class HostRoom:
    """A buffer of a pool.

    Args:
        section: of the configuration, whose `host_gib` is the pool's budget.

    Raises:
        TierFull: the pool's budget has no room for it.
    """

    tier = "host"

    def __init__(
        self, nbytes: int, pool: HostPool, copies: Copies, ledger: Ledger, *, fake: bool, section: str = "activations"
    ) -> None:
        buffer = pool.take(nbytes, fake=fake)
        if buffer is None:
            raise no_room(f"{section}.host_gib", pool.budget, nbytes, pool.reserved - pool.idle)
        self._buffer, self._pool, self._copies, self._ledger = buffer, pool, copies, ledger
        self._open: list[Ticket] = []
        self._put: Ticket | None = None
        ledger.hold(self.tier, nbytes)

    def put(self, near: Tensor) -> Ticket:
        self._put = DONE if self._buffer.memory is None else self._copies.out(near, self._buffer.memory)
        return self._started(self._put)

    def get(self, near: Tensor) -> Ticket:
        memory = self._buffer.memory
        return self._started(DONE if memory is None else self._copies.back(memory, near, self._put))

    def settled(self) -> None:
        """Note that the copies so far were waited for."""
        self._open.clear()

    def view(self) -> Tensor:
        """The bytes, (n,); a copy under way may still change them."""
        memory = self._buffer.memory
        assert memory is not None, "only the bookkeeping runs: there are no bytes"
        return memory if isinstance(memory, Tensor) else torch.from_numpy(memory)

    def close(self) -> None:
        for ticket in self._open:
            ticket.wait()
        self._open.clear()
        self._pool.give(self._buffer)
        self._ledger.hold(self.tier, -self._buffer.nbytes)

    def _started(self, ticket: Ticket) -> Ticket:
        self._open.append(ticket)
        return ticket


class SpillFile:
    """A file without a name: the system frees it with its last user, be that the end of a step or of the process."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="stowage-", buffering=0)  # noqa: SIM115
        self._end = 0
        self._map: mmap.mmap | None = None

    def reserve(self, nbytes: int, *, allocate: bool = False) -> int:
        """Return the offset of `nbytes` to be written.

        Args:
            allocate: take them from the disk at once, so that no later write can find it full.

        Raises:
            OSError: the disk has no room to allocate them.
        """
        if allocate:
            os.posix_fallocate(self._file.fileno(), self._end, nbytes)
        self._end += nbytes
        return self._end - nbytes

    def view(self, offset: int, nbytes: int) -> Tensor:
        """Allocated bytes as a tensor that is mapped from the file: read and written page by page, as it is used."""
        if self._map is None or len(self._map) < self._end:
            self._map = mmap.mmap(self._file.fileno(), self._end)
        return torch.from_numpy(np.frombuffer(self._map, np.uint8, nbytes, offset))

    def write(self, offset: int, content: memoryview) -> None:
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            offset, content = offset + written, content[written:]

    def read(self, offset: int, target: memoryview) -> None:
        while target:
            count = os.preadv(self._file.fileno(), [target], offset)
            if count == 0:
                raise OSError(f"the file of a disk tier ends early, at byte {offset}")
            offset, target = offset + count, target[count:]


class DiskRoom:
    """A stretch of a file, and beside CUDA a buffer to reach it through.

    Args:
        section: of the configuration, whose `disk_gib` is `budget`.
        lasting: whether it is for as long as the run lasts: taken from the disk at once.

    Raises:
        TierFull: the budget has no room for it.
        OSError: the disk has none.
    """

    tier = "disk"

    def __init__(
        self, nbytes: int, file: SpillFile | None, staging: HostPool | None, budget: int | None, copies: Copies,
        ledger: Ledger, *, section: str = "activations", lasting: bool = False,
    ) -> None:  # fmt: skip
        if budget is not None and ledger.held[self.tier] + nbytes > budget:
            raise no_room(f"{section}.disk_gib", budget, nbytes, ledger.held[self.tier])
        self._nbytes, self._file, self._pool, self._copies, self._ledger = nbytes, file, staging, copies, ledger
        self._offset = file.reserve(nbytes, allocate=lasting) if file else 0
        self._staging: Buffer | None = None
        self._open: list[Ticket] = []
        ledger.hold(self.tier, nbytes)

    def put(self, near: Tensor) -> Ticket:
        if self._file is None or isinstance(near, FakeTensor):
            return DONE
        file, offset = self._file, self._offset
        return self._started(self._copies.write(near, self._stage(), lambda content: file.write(offset, content)))

    def settled(self) -> None:
        """Note that the copies so far were waited for, so that their buffer serves others until the next one."""
        self._unstage()

    def view(self) -> Tensor:
        """The bytes, (n,), mapped from the file; for rooms that last. A copy under way may still change them."""
        assert self._file is not None, "only the bookkeeping runs: there are no bytes"
        return self._file.view(self._offset, self._nbytes)

    def get(self, near: Tensor) -> Ticket:
        if self._file is None or isinstance(near, FakeTensor):
            return DONE
        file, offset, staging = self._file, self._offset, self._stage()
        since = self._staging.last if self._staging is not None else None
        return self._started(self._copies.read(near, staging, lambda target: file.read(offset, target), since))

    def close(self) -> None:
        for ticket in self._open:
            with contextlib.suppress(OSError):  # told to whoever waited for the bytes themselves
                ticket.wait()
        self._unstage()
        self._ledger.hold(self.tier, -self._nbytes)

    def _stage(self) -> Tensor | None:
        if self._pool is None:
            return None
        if self._staging is None:
            self._staging = self._pool.take(self._nbytes)
        assert self._staging is not None, "the pool of staging buffers has no budget"
        assert isinstance(self._staging.memory, Tensor), "staging is pinned"
        return self._staging.memory

    def _unstage(self) -> None:
        """Give the buffer back, with the copy that the next reader of the disk, which is the host, waits for."""
        if self._staging is not None and self._pool is not None:
            self._staging.last = self._open[-1] if self._open else None
            self._pool.give(self._staging)
            self._staging = None
        self._open.clear()

    def _started(self, ticket: Ticket) -> Ticket:
        self._open.append(ticket)
        return ticket
