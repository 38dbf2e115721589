"""Copies between the device and what lies beyond it; the only file with streams, events and threads.

On CUDA a copy out runs on one stream, a copy back on another, and both beside the stream that computes:

    out    waits until the compute stream has made the bytes; whoever holds them near may let go once the compute
           stream waits for the copy (`Ticket.wait`), since the allocator hands memory on in that stream's order
    back   waits until the compute stream is done with what the near memory held before; readers wait for the copy

On CPU a thread copies, so that the order of things is the same and a missing wait shows: the tests hold every copy
back a while. Files are written and read by threads on both.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.pool import Memory, UnderWay


class Ticket:
    """A copy under way."""

    def __init__(self, work: Future[Any] | None = None, event: Any = None) -> None:
        self._work, self._event = work, event

    @property
    def event(self) -> Any:
        """On CUDA that of a copy between memories; None otherwise."""
        return self._event

    def wait(self) -> None:
        """Let nothing that follows on this thread (and its CUDA stream) run before the copy is done.

        Raises:
            OSError: of the file that was written or read.
        """
        event = self._event if self._work is None else self._work.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def finish(self) -> None:
        """Wait here, on the host, until the copy is done; errors are `wait`'s to raise."""
        failed = self._work is not None and self._work.exception() is not None
        event = None if failed else self._event if self._work is None else self._work.result()
        if event is not None:
            event.synchronize()


DONE = Ticket()
"""A copy that takes no time: of fake tensors."""


class Copies:
    """Starts copies for one device.

    Args:
        device: where near memory is.
        delay: seconds that every copy is held back, for tests; on CUDA counted in cycles of its clock, about as long.
    """

    def __init__(self, device: torch.device, *, delay: float = 0.0) -> None:
        self._cuda = device.type == "cuda"
        self._device, self._delay = device, delay
        self._threads: dict[str, ThreadPoolExecutor] = {}  # one for each direction: copies keep their order
        self._streams: dict[str, Any] = {}

    def moment(self) -> Any:
        """What the calling thread has given its CUDA stream to do up to now, for `out` to come after; None on CPU."""
        return torch.cuda.current_stream(self._device).record_event() if self._cuda else None

    def out(self, near: Tensor, far: Memory, after: Any = None) -> Ticket:
        """Copy (n,) bytes from the device to host memory. `near` must live until the ticket is waited for.

        Args:
            after: the `moment` from which on `near` holds what is to be copied; now, where it is None.
        """
        if self._cuda:
            return Ticket(event=self._copy_cuda("out", pinned(far), near, after))
        return self._thread("out", copy_bytes, far, near)

    def back(self, far: Memory, near: Tensor, since: "Ticket | None" = None) -> Ticket:
        """Copy (n,) bytes from host memory to the device. Both must live until the ticket is waited for.

        Args:
            since: the copy out of these bytes, which may have been waited for by another stream than the current one.
        """
        if self._cuda:
            return Ticket(event=self._copy_cuda("back", near, pinned(far), also=since.event if since else None))
        return self._thread("back", copy_bytes, near, far)

    def write(self, near: Tensor, staging: Tensor | None, put: Callable[[memoryview], None]) -> Ticket:
        """Give the bytes of `near` to `put`, on a thread; by way of `staging` (host memory) from CUDA."""
        if staging is None:
            return self._thread("out", lambda: put(byte_view(near)))
        copied = self._copy_cuda("out", staging, near)

        def write() -> Any:
            copied.synchronize()
            put(byte_view(staging))
            return copied

        return self._thread("out", write)

    def read(
        self, near: Tensor, staging: Tensor | None, get: Callable[[memoryview], None], since: UnderWay | None = None
    ) -> Ticket:
        """Let `get` fill the bytes of `near`, on a thread; by way of `staging` to CUDA.

        Args:
            since: the copy that has used `staging` last: the thread, which no stream holds back, waits for it.
        """
        if staging is None:
            return self._thread("back", lambda: get(byte_view(near)))
        ready = torch.cuda.current_stream(self._device).record_event()

        def read() -> Any:
            if since is not None:
                since.finish()
            get(byte_view(staging))
            return self._copy_cuda("back", near, staging, after=ready)

        return self._thread("back", read)

    def beside(self, work: Callable[[], None]) -> Ticket:
        """Do work of the host on a thread of its own, one after the other."""
        return self._thread("beside", work)

    def _thread(self, direction: str, work: Callable[..., Any], *args: Any) -> Ticket:
        if direction not in self._threads:
            self._threads[direction] = ThreadPoolExecutor(1, thread_name_prefix=f"stowage-{direction}")

        held = [work, *args]

        def run() -> Any:
            call, *taken = held
            held.clear()  # so that the memory near is the waiter's alone, to the instruction, once the copy is done
            if self._delay:
                time.sleep(self._delay)
            return call(*taken)

        del work, args

        return Ticket(work=self._threads[direction].submit(run))

    def _copy_cuda(self, direction: str, target: Tensor, source: Tensor, after: Any = None, also: Any = None) -> Any:
        """Copy on the stream of `direction`, after the event `after` or all that the compute stream has to do now, and
        after the event `also`."""
        with torch.cuda.device(self._device):
            if direction not in self._streams:
                self._streams[direction] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream = self._streams[direction]
            stream.wait_event(after or torch.cuda.current_stream().record_event())
            if also is not None:
                stream.wait_event(also)
            with torch.cuda.stream(stream):
                if self._delay:
                    torch.cuda._sleep(int(1e9 * self._delay))  # type: ignore[no-untyped-call]
                target.copy_(source, non_blocking=True)
                return stream.record_event()


def byte_view(memory: Tensor) -> memoryview:
    """The (n,) bytes of a CPU tensor, as files take them; the caller keeps it alive.

    By address, as `Tensor.numpy` would forbid for ever that the storage is freed and grown again.
    """
    return memoryview((ctypes.c_ubyte * memory.numel()).from_address(memory.data_ptr())).cast("B")


def copy_bytes(target: Memory, source: Memory) -> None:
    """Copy without torch's own threads, which those who compute are using."""
    np.copyto(array_of(target), array_of(source))


def array_of(memory: Memory) -> NDArray[np.uint8]:
    return np.frombuffer(byte_view(memory), np.uint8) if isinstance(memory, Tensor) else memory


def pinned(memory: Memory) -> Tensor:
    assert isinstance(memory, Tensor), "beside CUDA a pool's memory is pinned"
    return memory
