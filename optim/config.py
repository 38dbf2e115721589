"""One dataclass per optimizer, and the schedule. Option names are those the authors' packages use."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

DEFAULT_TARGETS = r"(attn|attention|mlp|feed_forward|ffn)\..*weight$"
"""The papers' rule: every matrix inside an attention or MLP module; not embeddings, head, norms, biases."""


class ProjType(Enum):
    """Which side of a gradient is projected; `std` keeps the basis on the smaller side."""

    std = "std"
    reverse_std = "reverse_std"
    left = "left"
    right = "right"


class Refresh(Enum):
    """How a new basis is found."""

    svd = "svd"
    gram = "gram"


class Compat(Enum):
    """Whose numerics are followed where the authors' package and torch differ."""

    torch = "torch"
    authors = "authors"


class ScheduleName(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(frozen=True)
class Rule:
    """Parameters whose name `pattern` finds and that have `ndim` dimensions take `options` as group keys."""

    key: str
    """The option that holds the pattern, for error messages."""
    label: str
    """Name of the parameter group."""
    pattern: str
    ndim: int
    options: dict[str, Any]


@dataclass(kw_only=True)
class OptimConfig:
    name: str = "adamw"
    """Set by `optim=...`: which optimizer."""
    lr: float = 1e-3
    """Peak learning rate; the schedule multiplies it."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment (torch's placement)."""
    weight_decay: float = 0.0
    """Decoupled decay (AdamW), applied to the weights before the update."""
    decay_vectors: bool = False
    """Whether norms, biases and other tensors of one dimension decay too."""

    def problems(self) -> list[str]:
        found = []
        if not self.lr >= 0 or self.lr == float("inf"):
            found.append(f"optim.lr={self.lr}: must be a finite number of at least 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            found.append(f"optim.betas={list(self.betas)}: needs two numbers in [0, 1), such as [0.9,0.999]")
        if not 0 < self.eps < 1:
            found.append(f"optim.eps={self.eps}: must lie between 0 and 1, such as 1e-8")
        if not 0 <= self.weight_decay < float("inf"):
            found.append(f"optim.weight_decay={self.weight_decay}: must be a finite number of at least 0")
        return found

    def options(self) -> dict[str, Any]:
        """Group keys that every parameter takes."""
        betas = (self.betas[0], self.betas[1])
        return {"lr": self.lr, "betas": betas, "eps": self.eps, "weight_decay": self.weight_decay}

    def rules(self) -> list[Rule]:
        """Parameters treated in a special way; the first rule that fits wins."""
        return []


@dataclass(kw_only=True)
class AdamWConfig(OptimConfig):
    pass


@dataclass(kw_only=True)
class GaLoreConfig(OptimConfig):
    name: str = "galore"
    lr: float = 1e-2
    rank: int | None = None
    """Rank of the gradient subspace; states of an m x n matrix shrink from 2mn to about 2 rank max(m, n). Default, as
    in the papers: a quarter of the model's hidden size (of the projected matrices' usual smaller side)."""
    update_proj_gap: int = 200
    """Steps between two refreshes of the subspace."""
    scale: float = 0.25
    """Factor on the projected update; it does not touch the weight decay."""
    proj_type: ProjType = ProjType.std
    """Side that is projected: `std` puts the basis on the smaller side of each matrix."""
    refresh: Refresh = Refresh.gram
    """How a basis is found: `svd` as the authors do, `gram` by an eigendecomposition of G G^T (same span, faster)."""
    targets: str = DEFAULT_TARGETS
    """Regular expression; matrices whose parameter name it finds are projected, the rest take plain AdamW."""
    compat: Compat = Compat.torch
    """torch: eps after the bias correction, decay before the update. authors: galore-torch step for step
    (eps before the correction, decay after the update, refresh=svd)."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.rank is not None and self.rank < 1:
            found.append(f"optim.rank={self.rank}: must be at least 1; the papers use a quarter of the hidden size")
        if self.update_proj_gap < 1:
            found.append(f"optim.update_proj_gap={self.update_proj_gap}: must be at least 1 step; 200 is usual")
        if not 0 < self.scale < float("inf"):
            found.append(f"optim.scale={self.scale}: must be a finite number above 0; 0.25 is usual")
        if self.compat is Compat.authors and self.refresh is not Refresh.svd:
            found.append("optim.compat=authors: the authors find a basis by SVD; add optim.refresh=svd")
        try:
            re.compile(self.targets)
        except re.error as error:
            found.append(
                f"optim.targets={self.targets!r}: not a regular expression ({error}); "
                f"the default is {DEFAULT_TARGETS!r}"
            )
        return found

    def options(self) -> dict[str, Any]:
        return super().options() | {"compat": self.compat.value}

    def rules(self) -> list[Rule]:
        options = {
            "rank": self.rank,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "proj_type": self.proj_type.value,
            "refresh": self.refresh.value,
        }
        return [Rule(key="optim.targets", label="projected", pattern=self.targets, ndim=2, options=options)]


@dataclass(kw_only=True)
class ScheduleConfig:
    name: ScheduleName = ScheduleName.cosine
    """Shape after the warmup: constant, linear, cosine, or wsd (warmup, stable, decay)."""
    warmup: float = 0.1
    """Linear warmup: a fraction of train.steps below 1, a number of steps from 1 on."""
    floor: float = 0.1
    """Fraction of the peak rate that the last step of the decay takes."""
    decay: float = 0.2
    """wsd only: length of the final decay, a fraction of train.steps below 1, a number of steps from 1 on."""

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.warmup < float("inf") or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            found.append(f"schedule.warmup={self.warmup}: a fraction below 1, or a whole number of steps")
        if not 0 <= self.floor <= 1:
            found.append(f"schedule.floor={self.floor}: must lie between 0 and 1")
        if not 0 < self.decay < float("inf") or (self.decay >= 1 and self.decay != int(self.decay)):
            found.append(f"schedule.decay={self.decay}: a fraction above 0 and below 1, or a whole number of steps")
        return found


CONFIGS: dict[str, type[OptimConfig]] = {"adamw": AdamWConfig, "galore": GaLoreConfig}
"""Every optimizer by the name it has in `optim.name`."""
