"""Bytes by kind over the samples of one counted step, and what to read off them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.memory.record import Record
from trainer.memory.storages import ACTIVATIONS, KINDS, WORKSPACE

BETWEEN = "between"
"""Phase of the samples that lie in none."""


@dataclass(frozen=True)
class Span:
    """One run through a phase: its first and last sample, both inside."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Peak:
    """The most bytes held at once."""

    total: int
    by_kind: dict[str, int]
    """Sums to `total`."""
    phase: str
    sample: int = field(compare=False)
    """Where in the timeline the storages counted were most."""
    unaccounted: int = 0
    """CUDA only: what the allocator held beyond the storages counted (rounding, scratch memory of kernels and
    libraries, memory of others). Part of `by_kind["workspace"]`."""
    requested: int | None = None
    """CUDA only: bytes asked for, before the allocator rounded each up; the most in the same phase."""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"total": self.total, "phase": self.phase, "by_kind": self.by_kind}
        if self.requested is not None:
            found |= {"unaccounted": self.unaccounted, "requested": self.requested}
        return found


@dataclass
class Timeline:
    """What one counted step held, sample by sample. Empty until the counting ends."""

    device: str = "cpu"
    bytes_by_kind: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(KINDS), 0), np.int64))
    """(kinds, samples): a sample after each operator that may have made a storage, and at each border of a phase."""
    spans: list[Span] = field(default_factory=list)
    """Every run through a phase, in the order of their ends; an inner phase lies within its outer one."""
    allocator: dict[str, tuple[int, int]] = field(default_factory=dict)
    """CUDA only: the allocator's peaks of each phase, in bytes allocated and requested."""
    elsewhere: dict[str, int] = field(default_factory=dict)
    """Bytes that other tiers held at the most: of activations `host` and `disk`, of states `states_host` and
    `states_disk`, of gradients `gradients_host`, of copies of weights `weights_host`; not among those of the device."""

    def fill(self, records: Sequence[Record], samples: int, spans: list[Span]) -> None:
        """Lay the lives of the storages over `samples` samples."""
        self.bytes_by_kind = bytes_by_kind(records, samples)
        self.spans = spans

    def __len__(self) -> int:
        return int(self.bytes_by_kind.shape[1])

    @property
    def total(self) -> NDArray[np.int64]:
        """(samples,): bytes of all kinds."""
        found: NDArray[np.int64] = self.bytes_by_kind.sum(axis=0)
        return found

    def at(self, sample: int) -> dict[str, int]:
        """Bytes by kind at one sample."""
        return dict(zip(KINDS, self.bytes_by_kind[:, sample].tolist(), strict=True))

    def ends(self, phase: str) -> list[dict[str, int]]:
        """Bytes by kind at the end of each run through `phase`."""
        return [self.at(span.last) for span in self.spans if span.name == phase]

    def phases(self) -> list[str]:
        """The innermost phase of each sample."""
        names = [BETWEEN] * len(self)
        for span in sorted(self.spans, key=lambda span: span.first - span.last):  # the longest, outermost, first
            names[span.first : span.last + 1] = [span.name] * (span.last + 1 - span.first)
        return names

    @property
    def peak_by_phase(self) -> dict[str, Peak]:
        """The peak of each phase, in the order the phases came."""
        names, total = self.phases(), self.total.tolist()
        highest: dict[str, int] = {}
        for sample, name in enumerate(names):
            if name not in highest or total[sample] > total[highest[name]]:
                highest[name] = sample
        return {name: self._peak(name, sample) for name, sample in highest.items()}

    @property
    def peak(self) -> Peak:
        """The peak of the whole step; of equal ones the first."""
        return max(self.peak_by_phase.values(), key=lambda peak: peak.total)

    def _peak(self, phase: str, sample: int) -> Peak:
        counted = self.at(sample)
        total = sum(counted.values())
        if phase not in self.allocator:
            return Peak(total, counted, phase, sample)
        allocated, requested = self.allocator[phase]
        unaccounted = allocated - total
        counted["workspace"] += unaccounted
        return Peak(allocated, counted, phase, sample, unaccounted, requested)

    def to_json(self) -> dict[str, Any]:
        """The measured part of memory.json: bytes."""
        return {
            "device": self.device,
            "samples": len(self),
            **({"elsewhere": self.elsewhere} if self.elsewhere else {}),
            "peak": self.peak.to_json(),
            "peak_by_phase": {name: peak.to_json() for name, peak in self.peak_by_phase.items()},
        }


def bytes_by_kind(records: Sequence[Record], samples: int) -> NDArray[np.int64]:
    """(kinds, samples): the sizes of the storages alive at each sample.

    A storage is of its kind from birth to death; one that is neither weights, gradients nor states is workspace,
    and activations while autograd holds it.
    """
    changes = np.zeros((len(KINDS), samples + 1), np.int64)
    for record in records:
        died = samples if record.died is None else record.died
        changes[record.kind, record.born] += record.size
        changes[record.kind, died] -= record.size
        if record.kind == WORKSPACE:
            sign = record.size
            for border in (*record.spans, died) if len(record.spans) % 2 else record.spans:
                changes[ACTIVATIONS, border] += sign
                changes[WORKSPACE, border] -= sign
                sign = -sign
    found: NDArray[np.int64] = changes.cumsum(axis=1)[:, :samples]
    return found
