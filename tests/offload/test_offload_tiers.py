"""Buffers on the way to a disk, as they are shared beside CUDA; and which device a tensor is on."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from offload import pool
from offload.pool import HostPool, Ledger
from offload.saving import is_on
from offload.streams import Copies
from offload.tiers import DiskRoom, SpillFile


class Event:
    """Stands in for CUDA's: of a copy that the device does later."""

    def __init__(self, copy: Any) -> None:
        self.copy: Any = copy

    def synchronize(self) -> None:
        if self.copy is not None:
            time.sleep(0.01)
            target, source = self.copy
            target.copy_(source)
            self.copy = None


def played_cuda(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Copies that begin when the host waits for them, as those of a device that lags behind may."""
    copies = Copies(torch.device("cpu"))
    events: list[Event] = []

    def copy(direction: str, target: Any, source: Any, **_: Any) -> Event:
        events.append(Event((target, source)))
        return events[-1]

    # a stream that waits for an event lets the copies before it go first, as they share a stream
    stream = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(copies, "_copy_cuda", copy)
    monkeypatch.setattr(pool, "registered", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    return copies


def test_a_buffer_is_filled_from_disk_when_the_copy_before_has_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rooms, one buffer: the second is read while the first is still on its way to the device."""
    copies, staging, ledger, file = played_cuda(monkeypatch), HostPool(pinned=True), Ledger(), SpillFile(tmp_path)
    wanted = [torch.full((64,), value, dtype=torch.uint8) for value in (1, 2)]
    found = [torch.zeros(64, dtype=torch.uint8) for _ in wanted]
    rooms = [DiskRoom(64, file, staging, None, copies, ledger) for _ in wanted]
    for room, near in zip(rooms, wanted, strict=True):
        room.put(near).wait()
        room.settled()
    tickets = []
    for room, near in zip(rooms, found, strict=True):
        tickets.append(room.get(near))
        tickets[-1].wait()  # the stream's wait: the copy itself may begin later
        room.close()
    assert staging.reserved == 64, "one buffer serves both"
    for ticket in tickets:
        ticket.finish()
    assert all(torch.equal(near, want) for near, want in zip(found, wanted, strict=True))


def test_a_device_without_an_index_is_any_of_its_type() -> None:
    with FakeTensorMode():
        second = torch.empty(1, device="cuda:1")
        assert is_on(torch.device("cuda"), second) and is_on(torch.device("cuda", 1), second)
        assert not is_on(torch.device("cuda", 0), second) and not is_on(torch.device("cpu"), second)
        assert is_on(torch.device("cpu"), torch.empty(1))
