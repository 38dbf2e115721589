"""The facts behind the live display: the run as a whole, the newest figures, the time to go."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.display.units import count_text

CURVE = 240
"""Parts of a run that the small loss curve tells apart."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What the display says about the run as a whole."""

    name: str
    model: str
    parameters: int
    optimizer: str
    device: str
    ranks: int = 1
    precision: str = ""
    run_dir: Path | None = None

    def facts(self, separator: str = " · ") -> str:
        """Describe the run in one line."""
        ranks = "1 process" if self.ranks == 1 else f"{self.ranks} processes"
        model = f"{self.model} ({count_text(self.parameters)} parameters)"
        parts = [model, self.optimizer, f"{ranks} on {self.device}", self.precision]
        return separator.join(part for part in parts if part)


@dataclass
class Trend:
    """Direction of a noisy curve: a quick moving average against a slow one (as Adam's, without their start bias)."""

    quick: float = 0.0
    slow: float = 0.0
    count: int = 0
    still: float = 0.002
    """Relative distance of the averages below which the curve counts as level."""

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self.count += 1
            self.quick += 0.4 * (value - self.quick)
            self.slow += 0.1 * (value - self.slow)

    @property
    def arrow(self) -> str:
        if self.count < 2:
            return " "
        quick, slow = self.quick / (1 - 0.6**self.count), self.slow / (1 - 0.9**self.count)
        change = (quick - slow) / max(abs(slow), 1e-12)
        return "→" if abs(change) < self.still else "↘" if change < 0 else "↗"


@dataclass
class View:
    """All that the panel shows. The training thread writes it, the drawing thread reads it."""

    info: RunInfo
    total_steps: int
    start_step: int = 0
    step: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)
    """The newest of each figure, and `eta` in seconds."""
    curve: dict[int, float] = field(default_factory=dict)
    """Training loss against progress, in CURVE parts of the whole run."""
    trend: Trend = field(default_factory=Trend)
    peak: int = 0
    phase: str = ""
    clock: Callable[[], float] = time.monotonic
    told: float = 0.0
    """When the last record came."""

    def __post_init__(self) -> None:
        self.told = self.clock()
        self.step = self.start_step

    def take(self, record: Mapping[str, Any]) -> None:
        """Take in one record; what it doesn't say stays as it was."""
        known = {name: value for name, value in record.items() if value is not None}
        self.record = {**self.record, **known}
        self.step = known.get("step", self.step)
        self.told = self.clock()
        self.peak = max(self.peak, sum(known.get("memory", {}).values()))
        if math.isfinite(loss := known.get("loss", math.nan)):
            self.trend.add(loss)
            # A new dictionary each time: the drawing thread may be walking through the old one.
            self.curve = {**self.curve, CURVE * max(self.step - 1, 0) // max(self.total_steps, 1): loss}

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run, interrupted parts included."""
        return float(self.record.get("seconds", 0.0)) + self.clock() - self.told

    @property
    def left(self) -> float | None:
        """Seconds to go: the last estimate, less the time since it was made."""
        eta = self.record.get("eta")
        return None if eta is None else max(0.0, eta - (self.clock() - self.told))
