"""States of sharded parameters, and sums over the ranks that share them.

A state tensor of a sharded parameter is a DTensor, so that a checkpoint loads at another rank count; the math sees
this rank's part of it through a `LocalState`. Small ones (a few numbers, means over the sharded dim) are plain, and
equal on all ranks.

A step that needs a sum over the ranks in its midst is a generator: it yields its own part and is sent the sum.
`together` runs many at once and makes one all-reduce of what they all ask for.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.dtensor import Layout, local

Sums = Generator[Tensor, Tensor, Any]
"""A step that yields parts of sums and is sent the sums."""

HELD = 2**24
"""Values that steps waiting for a sum may hold among them (64 MiB in fp32)."""


class LocalState(MutableMapping[str, Any]):
    """A parameter's state with this rank's part in place of each DTensor. Numbers are written to the state itself."""

    def __init__(self, state: MutableMapping[str, Any]) -> None:
        self._state = state

    def __getitem__(self, key: str) -> Any:
        value = self._state[key]
        return local(value) if isinstance(value, DTensor) else value

    def __setitem__(self, key: str, value: Any) -> None:
        assert not isinstance(self._state.get(key), Tensor), f"{key} is written in place"
        self._state[key] = value

    def __delitem__(self, key: str) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def new_tensors(
    make: Callable[[Tensor, tuple[int, ...]], dict[str, Tensor]], like: Tensor, layout: Layout
) -> dict[str, Tensor]:
    """What `make(like, shape)` makes for a tensor of `layout`, sharded as that is.

    Args:
        like: this rank's part of the parameter: device and dtype.
    """
    parts = make(like, layout.local_shape)
    if layout.dim is None:
        return parts
    wholes = make(like.new_empty(0, device="meta"), layout.shape)
    return {key: layout.like(wholes[key].shape, layout.dim).wrap(part) for key, part in parts.items()}


def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Copy a tensor of the same global shape, however either is sharded. All ranks must call it."""
    if isinstance(source, DTensor):
        if isinstance(target, DTensor) and (target.placements, target.device_mesh) == (
            source.placements,
            source.device_mesh,
        ):
            target.copy_(source)
            return
        source = source.full_tensor()
    local(target).copy_(Layout.of(target).cut(source))


@dataclass(frozen=True)
class Job:
    """A step to be run by `together`, of a tensor laid out as `layout`."""

    layout: Layout
    steps: Sums
    values: int
    """What it holds while it waits, on all ranks: where to begin another sum must be the same for each of them."""


def together(jobs: Iterable[Job]) -> list[Any]:
    """Run steps to their ends, side by side where they share a tensor among ranks; return what they return.

    All ranks must give the same steps in the same order.
    """
    results: list[Any] = []
    waiting: list[tuple[int, Job, Tensor]] = []
    held = 0
    for place, job in enumerate(jobs):
        results.append(None)
        if held + job.values // job.layout.count > HELD:
            _finish(waiting, results)
            waiting, held = [], 0
        part = _next(job, None, place, results)
        if part is not None:
            waiting.append((place, job, part))
            held += job.values // job.layout.count
    _finish(waiting, results)
    return results


def _next(job: Job, total: Tensor | None, place: int, results: list[Any]) -> Tensor | None:
    """Run on to the next sum over ranks, and return this rank's part of it; None at the end."""
    try:
        part = next(job.steps) if total is None else job.steps.send(total)
        while job.layout.whole:
            part = job.steps.send(part)
    except StopIteration as end:
        results[place] = end.value
        return None
    return part


def _finish(waiting: list[tuple[int, Job, Tensor]], results: list[Any]) -> None:
    while waiting:
        totals = sum_parts([(job.layout, part) for _, job, part in waiting])
        following = []
        for (place, job, _), total in zip(waiting, totals, strict=True):
            part = _next(job, total, place, results)
            if part is not None:
                following.append((place, job, part))
        waiting = following


def sum_parts(parts: list[tuple[Layout, Tensor]]) -> list[Tensor]:
    """Sum over ranks: one all-reduce for all parts of a group and dtype."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, (layout, part) in enumerate(parts):
        alike[layout.group, part.dtype, part.device].append(place)
    totals = [part for _, part in parts]
    for places in alike.values():
        flat = torch.cat([parts[place][1].reshape(-1) for place in places])
        parts[places[0]][0].sum_(flat)
        for place, total in zip(places, torch.split(flat, [parts[p][1].numel() for p in places]), strict=True):
            totals[place] = total.view(parts[place][1].shape)
    return totals
