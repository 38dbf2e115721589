"""Ranks of a sequence group as threads of one process, and attention over whole rows to hold them against."""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from parallel.sequence.blockwise import Method
from parallel.sequence.layout import Cut, Layout
from parallel.sequence.lightseq import LIGHTSEQ
from parallel.sequence.links import Pending
from parallel.sequence.ring import RING
from parallel.sequence.strategy import Exact


class Wire:
    """What connects the threads of one group."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.queues: dict[tuple[int, int], Queue[list[Tensor]]] = defaultdict(Queue)
        for source in range(count):
            for to in range(count):
                self.queues[source, to] = Queue()


class Later(Pending):
    def __init__(self, queue: "Queue[list[Tensor]] | None", coming: Sequence[Tensor]) -> None:
        super().__init__([])
        self.queue, self.coming = queue, coming

    def wait(self) -> list[Tensor]:
        if self.queue is None:
            return []
        came = self.queue.get(timeout=20)
        assert [(x.shape, x.dtype) for x in came] == [(x.shape, x.dtype) for x in self.coming]
        return came


class ThreadLinks:
    """One thread's connection; sends copies, as a wire does."""

    def __init__(self, wire: Wire, index: int) -> None:
        self.wire, self.count, self.index, self.sent = wire, wire.count, index, 0

    def exchange(self, send: Sequence[Tensor], to: int | None, coming: Sequence[Tensor], source: int | None) -> Pending:
        if to is not None:
            self.wire.queues[self.index, to].put([x.detach().clone() for x in send])
            self.sent += sum(x.nbytes for x in send)
        return Later(None if source is None else self.wire.queues[source, self.index], coming)

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


@dataclass
class Found:
    """Of whole rows."""

    out: Tensor
    gradients: list[Tensor]
    """Of q, k and v."""
    sent: list[int]
    """Bytes, by each rank."""


def members(cut: Cut, method: Method | None = None) -> list[Exact]:
    """A strategy for each rank, connected to the others. Default: a ring, or LightSeq where pieces are contiguous."""
    method = method or (RING if cut.zigzag else LIGHTSEQ)
    inner, outer = [Wire(cut.ulysses) for _ in range(cut.ring)], [Wire(cut.ring) for _ in range(cut.ulysses)]
    return [
        Exact(cut, rank, ThreadLinks(inner[rank // cut.ulysses], rank % cut.ulysses),
              ThreadLinks(outer[rank % cut.ulysses], rank // cut.ulysses), method)
        for rank in range(cut.degree)
    ]  # fmt: skip


def tensors(heads: tuple[int, int], dtype: torch.dtype, length: int, batch: int = 2) -> list[Tensor]:
    """q, k, v and the output's gradient, for `heads` query and key heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, count, length, 8) for count in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def split(cut: Cut, inputs: list[Tensor], layout: Layout, causal: bool, method: Method | None = None) -> Found:
    """Output and gradients of q, k, v, put together from all ranks."""
    strategies = members(cut, method)

    def run(rank: int) -> list[Tensor]:
        local = [layout.take(x.transpose(1, 2), rank).transpose(1, 2) for x in inputs]
        q, k, v = (x.clone().requires_grad_() for x in local[:3])
        out = strategies[rank].attend(q, k, v, layout, causal=causal, scale=0.3)
        out.backward(local[3])
        return [out.detach(), q.grad, k.grad, v.grad]

    found = on_threads(cut.degree, run)
    whole = [layout.put([part[i].transpose(1, 2) for part in found]).transpose(1, 2) for i in range(4)]
    return Found(whole[0], whole[1:], [each.inner.sent + each.outer.sent for each in strategies])


def whole(inputs: list[Tensor], layout: Layout, causal: bool) -> Found:
    q, k, v = (x.double().detach().requires_grad_() for x in inputs[:3])
    out = dense(q, k, v, layout.documents, causal=causal, scale=0.3)
    out.backward(inputs[3].double())
    return Found(out.detach(), [q.grad, k.grad, v.grad], [])


def furthest(found: Found, expected: Found) -> float:
    """Largest difference beside the largest value, over output and gradients."""
    pairs = zip([found.out, *found.gradients], [expected.out, *expected.gradients], strict=True)
    return max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)
