"""Copies beside the computation: whole before their tensors change, in bounded memory."""

import threading
from collections.abc import Iterator

import pytest
import torch

from offload.snapshot import Snapshot, Snapshots

SLOW = 0.02
CPU = torch.device("cpu")


def tensors() -> list[torch.Tensor]:
    """Of every kind that states have: odd shapes, views, transposed, empty, scalar, one byte wide."""
    torch.manual_seed(0)
    return [
        torch.randn(7, 5),
        torch.randn(40)[3:19],
        torch.randn(6, 4).T,
        torch.zeros(0, 3),
        torch.tensor(2.5, dtype=torch.float64),
        torch.randn(33).bfloat16(),
        torch.randint(0, 255, (17,), dtype=torch.uint8),
        torch.randn(16).to(torch.float8_e4m3fn),
        torch.randn(9) > 0,
    ]


def written(snapshot: Snapshot, given: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """As the writing thread does: begin, take each in its turn, end."""
    try:
        snapshot.begin(given)
        for _ in given:
            yield snapshot.take().clone()
    finally:
        snapshot.end()


@pytest.mark.parametrize("budget", [None, 64], ids=["all_at_once", "64_bytes"])
def test_copies_hold_the_values_before_an_update_that_comes_at_once(budget: int | None) -> None:
    given, expected, found = tensors(), tensors(), []
    snapshot = Snapshots(CPU, budget, delay=SLOW).now()
    writer = threading.Thread(target=lambda: found.extend(written(snapshot, given)))
    writer.start()
    snapshot.wait()
    for tensor in given:
        tensor.zero_()
    writer.join()
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def test_without_the_wait_they_would_hold_values_after_it() -> None:
    given = [torch.ones(5)]
    snapshot = Snapshots(CPU, delay=SLOW).now()
    snapshot.begin(given)
    given[0].zero_()
    assert not snapshot.take().any()
    snapshot.end()


@pytest.mark.parametrize("budget", [100, 400, 10**6])
def test_memory_stays_within_the_budget_or_the_largest_tensor(budget: int) -> None:
    snapshots = Snapshots(CPU, budget)
    for _ in range(3):
        snapshot = snapshots.now()
        given = tensors()
        for _ in written(snapshot, given):
            pass
        assert snapshot.nbytes == sum(tensor.nbytes for tensor in given)
    assert snapshots.peak <= max(budget, max(tensor.nbytes for tensor in given))
    assert budget < 10**6 or snapshots.peak == snapshot.nbytes, "buffers are used again"


def test_a_writer_that_gives_up_lets_training_go_on() -> None:
    for begun in (False, True):
        snapshot = Snapshots(CPU, 100, delay=SLOW).now()
        if begun:
            snapshot.begin(tensors())
        threading.Timer(SLOW, snapshot.end).start()
        snapshot.wait()


def test_what_is_copied_is_held_no_longer_than_until_it_is_waited_for() -> None:
    given = tensors()
    snapshot = Snapshots(CPU).now()
    snapshot.begin(given)
    snapshot.wait()
    freed = torch.multiprocessing.reductions.StorageWeakRef(given[0].untyped_storage())
    given.clear()
    assert freed.expired(), "the optimizer may replace a state long before the copy is written"
    snapshot.end()


def test_no_memory_for_a_copy_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.pool import HostPool

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(HostPool, "take", refuse)
    with pytest.raises(OSError, match="no host memory for a copy of 140 bytes"):
        Snapshots(CPU).now().begin(tensors())


@pytest.mark.gpu
def test_copies_leave_a_gpu_before_an_update_queued_after_the_wait() -> None:
    device = torch.device("cuda")
    given = [torch.full((2**22,), float(i), device=device) for i in range(8)]
    snapshot = Snapshots(device).now()
    work = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        work = work @ work * 1e-2  # the shadow: the copies must not wait for it
    found: list[torch.Tensor] = []
    writer = threading.Thread(target=lambda: found.extend(written(snapshot, given)))
    writer.start()
    snapshot.wait()
    for tensor in given:
        tensor.fill_(-1.0)
    writer.join()
    assert [float(each.max()) for each in found] == [float(each.min()) for each in found] == list(range(8))
