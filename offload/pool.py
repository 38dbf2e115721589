"""Host memory for what leaves the device: buffers that are used again, within a budget, and a ledger of who holds what.

A pinned buffer takes milliseconds to make, and a step asks for the same sizes as the one before: what is given back
is kept for the next taker of its size. Idle buffers are freed where the budget would otherwise refuse a new one.
"""

import contextlib
import errno
import mmap
import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN = 64
"""Bytes: where torch's allocator lets tensors begin."""
OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation: of CUDA's own memory or of what the system lets a process lock."""


class TierError(RuntimeError):
    """A tier failed, and the run is to stop. `remedy` says what to do, with options as the user writes them."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class TierFull(TierError):
    """A tier cannot take what it is to hold."""


class TierLost(TierError):
    """A tier cannot give back what it took."""


Memory = Tensor | NDArray[np.uint8]
"""(n,) bytes of host memory: a pinned tensor beside CUDA. Beside the CPU an array, since there the meter counts every
tensor that torch makes as the device's, and this is the other side of the border."""


class UnderWay(Protocol):
    """A copy that may not be done yet."""

    def finish(self) -> None:
        """Wait here, on the host, until it is."""


@dataclass(eq=False)
class Buffer:
    """Bytes of host memory on loan from a pool."""

    nbytes: int
    memory: Memory | None
    """None where only the bookkeeping runs, on fake tensors."""
    last: UnderWay | None = None
    """The copy that used it last. Copies on CUDA come one after the other by themselves; a thread of the host that
    fills the buffer for the next taker waits for this one first."""


@dataclass
class Ledger:
    """What was moved, and what lies elsewhere now and at the most. Bytes by tier: `host`, `disk`."""

    out: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    back: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    held: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    refused: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """What a tier had no room for, or failed to write, and so stayed on the device."""
    forwarded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """What was asked for again before it had left, and handed back from where it was."""
    compressed: int = 0
    """Bytes that became codes, as they were before."""
    codes: int = 0
    """Bytes of those codes and their scales."""

    def hold(self, tier: str, nbytes: int) -> None:
        """Note that `tier` holds `nbytes` more (or less, where negative)."""
        self.held[tier] += nbytes
        self.peak[tier] = max(self.peak[tier], self.held[tier])

    def restart_peaks(self) -> None:
        """Begin a new measurement of the most held."""
        self.peak = defaultdict(int, self.held)


class HostPool:
    """Buffers of host memory.

    Args:
        budget: bytes at most, idle buffers included; None for no limit.
        pinned: whether buffers are page-locked, as asynchronous copies from and to CUDA need.
    """

    def __init__(self, budget: int | None = None, *, pinned: bool = False) -> None:
        self.budget, self.pinned = budget, pinned
        self.reserved = 0
        """Bytes allocated: lent and idle."""
        self._idle: dict[int, list[Buffer]] = defaultdict(list)

    @property
    def idle(self) -> int:
        """Bytes kept for the next taker."""
        return sum(size * len(buffers) for size, buffers in self._idle.items())

    def take(self, nbytes: int, *, fake: bool = False) -> Buffer | None:
        """Lend a buffer of exactly `nbytes`; None where the budget has no room for it."""
        if self._idle[nbytes]:
            return self._idle[nbytes].pop()
        if self.budget is not None and self.reserved + nbytes > self.budget:
            self._free_idle()
            if self.reserved + nbytes > self.budget:
                return None
        memory = None if fake else self._allocate(nbytes)
        self.reserved += nbytes
        return Buffer(nbytes, memory)

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back; the caller has seen to it that nothing reads or writes it any more."""
        self._idle[buffer.nbytes].append(buffer)

    def _allocate(self, nbytes: int) -> Memory:
        if self.pinned:
            return registered(nbytes)
        # where torch's own tensors would begin: with the place of an operand a product's order of sums may change
        room = np.empty(nbytes + ALIGN, np.uint8)
        return room[(begin := -room.ctypes.data % ALIGN) : begin + nbytes]

    def _free_idle(self) -> None:
        self.reserved -= self.idle
        self._idle.clear()


def registered(nbytes: int) -> Tensor:
    """(n,) bytes of ordinary memory that CUDA is told of, page-locked until nobody holds them.

    torch's own pinned memory is rounded up to a power of two and never returned to the system; this is what was asked
    for, to the page. Pages are nobody else's, as each can be registered once. Otherwise as torch.distributed's
    checkpoints pin theirs (`_state_dict_utils._create_cpu_state_dict`).

    Raises:
        OSError: the system does not lock so much.
    """
    pages = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    if not pages:
        return torch.empty(0, dtype=torch.uint8)
    room = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(room, np.uint8, nbytes)
    address, cudart = array.ctypes.data, torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(cudart.cudaHostRegister(address, pages, 1))  # 1: for every CUDA context
    if status:
        forget_error()
        code = errno.ENOMEM if status == OUT_OF_MEMORY else errno.EIO
        raise OSError(code, f"CUDA could not page-lock {nbytes:,} bytes of host memory (error {status})")
    weakref.finalize(array, unregister, address, torch.cuda.current_device())
    return torch.from_numpy(array)


def unregister(address: int, device: int) -> None:
    """Take registered memory from CUDA, once no copy from or to it is under way: its pages are about to go."""
    with contextlib.suppress(RuntimeError):  # where CUDA has failed, whoever was computing has been told
        torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def forget_error() -> None:
    """Take CUDA's last error out of its memory: torch would see it in the next kernel, which has no part in it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
