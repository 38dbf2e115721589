"""Where the bytes of a run are: weights, gradients, states, activations, workspace.

    weights      parameters and buffers
    gradients    what parameters' `.grad` holds, from the operator that made it on; projections that add up in its place
    states       tensors in the optimizer's state
    activations  storages that autograd holds for backward, module inputs kept for recomputation included; bf16 copies
                 of weights that autocast makes and backward needs are among them
    workspace    everything else alive: logits, temporaries, communication buffers, the batch

Each storage counts once, whatever number of tensors share it, and in the first kind of this list that claims it.
On CPU the count is exact but for scratch memory inside a kernel. On CUDA the caching allocator's own figures are the
truth for totals, and what it holds beyond the storages counted is shown as `unaccounted` within workspace.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.optim import Optimizer

from offload.pool import Ledger
from trainer.memory.count import StorageCounter
from trainer.memory.storages import HELD_KINDS, KINDS, held_bytes
from trainer.memory.timeline import BETWEEN, Peak, Span, Timeline

__all__ = [
    "HELD_KINDS",
    "KINDS",
    "MemoryMeter",
    "Peak",
    "Span",
    "Timeline",
    "beside_text",
    "by_kind_line",
    "format_bytes",
]

KINDS_BESIDE = {
    "activations": "", "optimizer states": "states_", "gradients": "gradients_", "copies of weights": "weights_",
}  # fmt: skip
"""What may lie beside the device, and the prefix of its tiers in `Timeline.elsewhere`."""

_OFF = nullcontext()


class CudaPeaks:
    """The caching allocator's peaks, phase by phase. Owns the peak statistics of `device` while it is used."""

    def __init__(self, device: torch.device):
        self.by_phase: dict[str, tuple[int, int]] = {}
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def close(self, phase: str) -> None:
        """Credit the peak since the last call to `phase`. Allocation is the host's doing: no synchronisation needed."""
        stats = torch.cuda.memory_stats(self._device)
        allocated, requested = self.by_phase.get(phase, (0, 0))
        self.by_phase[phase] = (
            max(allocated, stats["allocated_bytes.all.peak"]),
            max(requested, stats["requested_bytes.all.peak"]),
        )
        torch.cuda.reset_peak_memory_stats(self._device)


class MemoryMeter:
    """Bytes of a run by kind: cheap figures at any time, exact ones of a counted step.

    Args:
        model: the module that owns the parameters (inside DDP or not).
        optimizer: whose state is counted.
        device: where the run computes; storages elsewhere are not counted.
        allocator: whether the CUDA allocator is asked too. It knows nothing of fake tensors, and resetting its peaks
            would disturb a run beside them.
        elsewhere: account of activations that were moved to other tiers; None where none are.
        beside: accounts of other kinds that were, each by the prefix that its tiers are told with.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        *,
        allocator: bool = True,
        elsewhere: Ledger | None = None,
        beside: Mapping[str, Ledger] | None = None,
    ):
        self._model, self._optimizer, self._allocator = model, optimizer, allocator
        self._elsewhere = ({} if elsewhere is None else {"": elsewhere}) | dict(beside or {})
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.at = "start"
        """Phase entered last: where this rank is, for those who wait for it."""
        self._counting: _Counting | None = None

    def held(self) -> dict[str, int]:
        """Bytes now of weights, gradients and states: each storage once, through views and wrapper subclasses."""
        return held_bytes(self._model, self._optimizer, self.device)

    def held_beside(self) -> dict[str, int]:
        """Bytes now in other tiers, as in `Timeline.elsewhere`; no part of what `held` counts."""
        return self._held_elsewhere("held")

    def _held_elsewhere(self, moment: str) -> dict[str, int]:
        return {
            prefix + tier: size
            for prefix, ledger in self._elsewhere.items()
            for tier, size in getattr(ledger, moment).items()
            if size
        }

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Mark what runs inside as phase `name`: forward, backward, clip, step, load, eval. Free while not counting."""
        self.at = name
        return _OFF if self._counting is None else self._counting.phase(name)

    @contextmanager
    def count_step(self) -> Iterator[Timeline]:
        """Count everything inside, exactly and by kind; the timeline is filled when the block ends.

        Neither results nor lifetimes change. Each operator takes about 20 microseconds longer.
        """
        assert self._counting is None, "a step is being counted already"
        timeline = Timeline(device=str(self.device))
        for ledger in self._elsewhere.values():
            ledger.restart_peaks()
        counting = self._counting = _Counting(self._model, self._optimizer, self.device, self._allocator)
        try:
            with counting.counter.counting():
                yield timeline
            counting.finish(timeline)
            timeline.elsewhere = self._held_elsewhere("peak")
        finally:
            self._counting = None


class _Counting:
    """One counting under way: the counter, the phases, and the allocator's view of them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device, allocator: bool):
        self.counter = StorageCounter(model, optimizer, device)
        self._cuda = CudaPeaks(device) if device.type == "cuda" and allocator else None
        self._open: list[str] = []
        self._spans: list[Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        first = self._border()
        self._open.append(name)
        try:
            yield
        finally:
            last = self._border()
            self._open.pop()
            self._spans.append(Span(name, first, last))

    def finish(self, timeline: Timeline) -> None:
        self._close_segment()
        timeline.fill(self.counter.records, self.counter.now + 1, self._spans)
        if self._cuda is not None:
            timeline.allocator = self._cuda.by_phase

    def _border(self) -> int:
        self._close_segment()
        return self.counter.border()

    def _close_segment(self) -> None:
        if self._cuda is not None:
            self._cuda.close(self._open[-1] if self._open else BETWEEN)


def format_bytes(count: float) -> str:
    """Bytes as people read them, three digits: `512 B`, `1.50 KiB`, `23.4 MiB`, `1.20 GiB` (GiB is 2**30)."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 999.5 or unit == "GiB":
            break
        size /= 1024
    if unit == "B":
        return f"{size:.0f} B"
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:,.{digits}f} {unit}"


def by_kind_line(by_kind: dict[str, int]) -> str:
    """One line such as `weights 12.3 MiB · gradients 12.3 MiB · states 3.10 MiB`, in the order of the kinds."""
    return " · ".join(f"{kind} {format_bytes(by_kind[kind])}" for kind in KINDS if kind in by_kind)


def beside_text(elsewhere: Mapping[str, int]) -> list[str]:
    """What lies beside the device, as of `Timeline.elsewhere`: a sentence for each kind."""
    found = []
    for what, prefix in KINDS_BESIDE.items():
        places = {"host": "host memory", "disk": "files on disk"}
        held = [
            f"{format_bytes(elsewhere[prefix + t])} of {name}" for t, name in places.items() if prefix + t in elsewhere
        ]
        if held:
            found.append(f"Beside the device, {what} take {' and '.join(held)}.")
    return found
