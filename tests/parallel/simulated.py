"""Ranks of a sequence group as threads of one process, and attention over whole rows to hold them against."""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from parallel.sequence.links import Pending, Shape


class Wire:
    """What connects the threads of one group."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.queues: dict[tuple[int, int], Queue[list[Tensor]]] = defaultdict(Queue)
        for source in range(count):
            for to in range(count):
                self.queues[source, to] = Queue()


class Later(Pending):
    def __init__(self, queue: "Queue[list[Tensor]] | None", shapes: Sequence[Shape]) -> None:
        super().__init__([])
        self.queue, self.shapes = queue, shapes

    def wait(self) -> list[Tensor]:
        if self.queue is None:
            return []
        came = self.queue.get(timeout=20)
        assert [tuple(x.shape) for x in came] == [tuple(shape) for shape in self.shapes]
        return came


class ThreadLinks:
    """One thread's connection; sends copies, as a wire does."""

    def __init__(self, wire: Wire, index: int) -> None:
        self.wire, self.count, self.index, self.sent = wire, wire.count, index, 0

    def exchange(
        self, send: Sequence[Tensor], to: int | None, shapes: Sequence[Shape], source: int | None, like: Tensor
    ) -> Pending:
        if to is not None:
            self.wire.queues[self.index, to].put([x.detach().clone() for x in send])
            self.sent += sum(x.nbytes for x in send)
        return Later(None if source is None else self.wire.queues[source, self.index], shapes)

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        for to, part in enumerate(parts):
            self.wire.queues[self.index, to].put([part.detach().clone()])
            self.sent += part.nbytes if to != self.index else 0
        found = [self.wire.queues[source, self.index].get(timeout=20)[0] for source in range(self.count)]
        assert [x.numel() for x in found] == list(lengths)
        return found

    def all_gather(self, tensor: Tensor) -> Pending:
        for to in range(self.count):
            self.wire.queues[self.index, to].put([tensor.detach().clone()])
        self.sent += (self.count - 1) * tensor.nbytes
        came = [self.wire.queues[source, self.index].get(timeout=20)[0] for source in range(self.count)]
        return Pending([torch.stack(came)])

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        flat = self.all_to_all([part.flatten() for part in parts], [parts[0].numel()] * self.count)
        return torch.stack(flat).sum(0).view(parts.shape[1:])


def on_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Return what function(rank) returns for each rank, all running at once."""
    found: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = function(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return [found[rank] for rank in range(count)]


def dense(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[Sequence[int]], *, causal: bool, scale: float) -> Tensor:
    """softmax(scale q k^T) v with a mask that keeps documents apart; grouped keys repeated. Slow and obvious."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    places = torch.arange(q.shape[2])
    document = torch.stack([torch.bucketize(places, torch.tensor(row), right=True) for row in starts])
    allowed = document[:, :, None] == document[:, None, :]
    if causal:
        allowed &= places[None, :, None] >= places[None, None, :]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed[:, None], float("-inf"))
    return scores.softmax(-1) @ v
