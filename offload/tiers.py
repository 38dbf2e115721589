"""Where a moved storage waits for backward: in host memory, or in a file that has no name.

Both answer the same three calls. `put` starts the copy out and says whether there is room; `get` starts the copy back;
`close` gives the room back, whatever is under way. All memory near is (n,) uint8, and the caller's.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import IO, Protocol

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from offload.pool import Buffer, HostPool, Ledger, TierFull
from offload.streams import DONE, Copies, Ticket


class Room(Protocol):
    """The place of one storage in a tier."""

    tier: str

    def put(self, near: Tensor) -> Ticket: ...
    def get(self, near: Tensor) -> Ticket: ...
    def close(self) -> None: ...


class HostRoom:
    """A buffer of a pool."""

    tier = "host"

    def __init__(self, nbytes: int, pool: HostPool, copies: Copies, ledger: Ledger, *, fake: bool) -> None:
        buffer = pool.take(nbytes, fake=fake)
        if buffer is None:
            raise TierFull(
                f"activations.host_gib={(pool.budget or 0) / 2**30:.3g} has no room for {nbytes:,} bytes more "
                f"({pool.reserved - pool.idle:,} are taken)"
            )
        self._buffer, self._pool, self._copies, self._ledger = buffer, pool, copies, ledger
        self._open: list[Ticket] = []
        ledger.hold(self.tier, nbytes)

    def put(self, near: Tensor) -> Ticket:
        return self._started(DONE if self._buffer.memory is None else self._copies.out(near, self._buffer.memory))

    def get(self, near: Tensor) -> Ticket:
        return self._started(DONE if self._buffer.memory is None else self._copies.back(self._buffer.memory, near))

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

    def reserve(self, nbytes: int) -> int:
        """Return the offset of `nbytes` to be written."""
        self._end += nbytes
        return self._end - nbytes

    def write(self, offset: int, content: memoryview) -> None:
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            offset, content = offset + written, content[written:]

    def read(self, offset: int, target: memoryview) -> None:
        while target:
            count = os.preadv(self._file.fileno(), [target], offset)
            if count == 0:
                raise OSError(f"a spilled activation ends early, at byte {offset}")
            offset, target = offset + count, target[count:]


class DiskRoom:
    """A stretch of a file, and beside CUDA a buffer to reach it through."""

    tier = "disk"

    def __init__(
        self, nbytes: int, file: SpillFile | None, staging: HostPool | None, budget: int | None, copies: Copies,
        ledger: Ledger,
    ) -> None:  # fmt: skip
        if budget is not None and ledger.held[self.tier] + nbytes > budget:
            raise TierFull(
                f"activations.disk_gib={budget / 2**30:.3g} has no room for {nbytes:,} bytes more "
                f"({ledger.held[self.tier]:,} are taken)"
            )
        self._nbytes, self._file, self._pool, self._copies, self._ledger = nbytes, file, staging, copies, ledger
        self._offset = file.reserve(nbytes) if file else 0
        self._staging: Buffer | None = None
        self._open: list[Ticket] = []
        ledger.hold(self.tier, nbytes)

    def put(self, near: Tensor) -> Ticket:
        if self._file is None or isinstance(near, FakeTensor):
            return DONE
        file, offset = self._file, self._offset
        return self._started(self._copies.write(near, self._stage(), lambda content: file.write(offset, content)))

    def settled(self) -> None:
        """Note that the copy out was waited for, so that its buffer serves others until the bytes come back."""
        self._open.clear()
        self._unstage()

    def get(self, near: Tensor) -> Ticket:
        if self._file is None or isinstance(near, FakeTensor):
            return DONE
        file, offset = self._file, self._offset
        return self._started(self._copies.read(near, self._stage(), lambda target: file.read(offset, target)))

    def close(self) -> None:
        for ticket in self._open:
            with contextlib.suppress(OSError):  # told to whoever waited for the bytes themselves
                ticket.wait()
        self._open.clear()
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
        if self._staging is not None and self._pool is not None:
            self._pool.give(self._staging)
            self._staging = None

    def _started(self, ticket: Ticket) -> Ticket:
        self._open.append(ticket)
        return ticket
