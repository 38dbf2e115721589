"""Options of the optimizers that project gradients."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from optim.config_base import AdafactorConfig, AdamWConfig, OptimConfig, Rule, States, finite

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

    warm = "warm"
    gram = "gram"
    svd = "svd"
    randomized = "randomized"
    random = "random"


class OnRefresh(Enum):
    """What becomes of the moments when the basis changes."""

    keep = "keep"
    sign = "sign"
    procrustes = "procrustes"
    rotate = "rotate"
    reset = "reset"


class Basis(Enum):
    """How a basis is kept between two steps."""

    fp32 = "fp32"
    int4 = "int4"
    regenerate = "regenerate"


class Products(Enum):
    """Operands of the products with a basis."""

    fp32 = "fp32"
    bf16 = "bf16"


class ScaleType(Enum):
    """What shares one scale in APOLLO."""

    channel = "channel"
    tensor = "tensor"


class Compat(Enum):
    """Whose numerics are followed where the authors' package and torch differ."""

    torch = "torch"
    authors = "authors"


@dataclass(kw_only=True)
class TargetedConfig(OptimConfig):
    """Options of methods that treat some matrices in their own way."""

    rank: int | None = None
    """Rank of the gradient subspace; states of an m x n matrix shrink from 2mn to about 2 rank max(m, n). Default, as
    in the papers: a quarter of the model's hidden size (of the projected matrices' usual smaller side)."""
    targets: str = DEFAULT_TARGETS
    """Regular expression; matrices whose parameter name it finds are projected, the rest take the plain rule."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.rank is not None and self.rank < 1:
            found.append(f"optim.rank={self.rank}: must be at least 1; the papers use a quarter of the hidden size")
        try:
            re.compile(self.targets)
        except re.error as error:
            found.append(
                f"optim.targets={self.targets!r}: not a regular expression ({error}); "
                f"the default is {DEFAULT_TARGETS!r}"
            )
        return found

    def target_options(self) -> dict[str, Any]:
        """Group keys that the targets take."""
        return {"rank": self.rank}

    def rules(self) -> list[Rule]:
        return [Rule("optim.targets", "projected", self.targets, 2, self.target_options())]


@dataclass(kw_only=True)
class ProjectedConfig(TargetedConfig):
    update_proj_gap: int = 200
    """Steps between two refreshes of the subspace."""
    scale: float = 0.25
    """Factor on the projected update; it does not touch the weight decay."""
    proj_type: ProjType = ProjType.std
    """Side that is projected: `std` puts the basis on the smaller side of each matrix."""
    refresh: Refresh = Refresh.warm
    """How a basis is found: `warm` by one pass of power iteration from the last basis, the first as `gram`; `gram` by
    an eigendecomposition of G G^T; `svd` as the authors do; `randomized` from a sketch; `random` (APOLLO) without G."""
    on_refresh: OnRefresh = OnRefresh.keep
    """What becomes of the moments: `keep` them; turn the new basis to the old one (`sign`, `procrustes`); turn them to
    the new basis (`rotate`); begin anew (`reset`)."""
    basis: Basis = Basis.fp32
    """How a basis is kept: fp32; int4 as Q-GaLore, packed two values a byte, groups of 256; regenerate, for APOLLO's
    random one: not at all, it is drawn again at each step (on the CPU, 5 ns or so a value)."""
    basis_copies: bool = False
    """parallel.zero above 0: keep the whole basis of a matrix on every rank, r k values, rather than a share of it that
    is gathered for each step. Where shards cut the projected side each rank has its part of the basis in any case."""
    products: Products | None = None
    """Operands of the products of gradients and steps with a basis: fp32, as they are; bf16, rounded to that and summed
    in fp32, at ten times the rate on an H100. Bases are found in fp32. Default: bf16 on CUDA where precision.compute
    is bf16 or fp8, as gradients have no more digits then; fp32 else."""
    stagger: bool = False
    """Spread the refreshes of different matrices over the gap, by their names, so that no step makes them all."""
    lazy: bool = False
    """Q-GaLore: double a matrix's gap while its subspaces hardly change."""
    lazy_threshold: float = 0.4
    """lazy: mean overlap of the last five refreshes, 0 to 1, from which the gap doubles."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.update_proj_gap < 1:
            found.append(f"optim.update_proj_gap={self.update_proj_gap}: must be at least 1 step; 200 is usual")
        found += finite("scale", self.scale, above=0)
        if not 0 < self.lazy_threshold <= 1:
            found.append(f"optim.lazy_threshold={self.lazy_threshold}: must lie above 0 and up to 1; 0.4 is usual")
        elif self.lazy_threshold != ProjectedConfig.lazy_threshold and not self.lazy:
            found.append(f"optim.lazy_threshold={self.lazy_threshold}: has no effect without optim.lazy=true; add it")
        return found + self.combination_problems()

    def combination_problems(self) -> list[str]:
        """Options that fit each by itself and not together."""
        if self.refresh is not Refresh.random:
            return self.regenerate_problems()
        return [
            "optim.refresh=random: a random basis only measures gradients (optim=apollo); turning a step back needs an "
            "orthonormal one; use optim.refresh=warm"
        ]

    def regenerate_problems(self) -> list[str]:
        if self.basis is not Basis.regenerate:
            return []
        if self.refresh is Refresh.random:
            useless = "optim.basis_copies=true: optim.basis=regenerate keeps no basis to copy; leave one out"
            return [useless] if self.basis_copies else []
        return [
            f"optim.basis=regenerate: a basis of optim.refresh={self.refresh.value} follows gradients and cannot be "
            "drawn again; use optim.basis=fp32, or optim=apollo with optim.refresh=random"
        ]

    def compat_problems(self, refresh: str) -> list[str]:
        """Options that the authors' package, which finds a basis by `refresh`, does not have."""
        asked = {"refresh": self.refresh, "on_refresh": self.on_refresh, "basis": self.basis, "states": self.states,
                 "products": self.products or Products.fp32}  # fmt: skip
        theirs = {"refresh": refresh, "on_refresh": "keep", "basis": "fp32", "states": "fp32", "products": "fp32"}
        return [
            f"optim.compat=authors: the authors' package has {key}={theirs[key]}; add optim.{key}={theirs[key]}"
            for key, value in asked.items()
            if value.value != theirs[key]
        ]

    def target_options(self) -> dict[str, Any]:
        return super().target_options() | {
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "proj_type": self.proj_type.value,
            "refresh": self.refresh.value,
            "on_refresh": self.on_refresh.value,
            "basis": self.basis.value,
            "basis_copies": self.basis_copies,
            "products": (self.products or Products.fp32).value,
            "stagger": self.stagger,
            "lazy": self.lazy,
            "lazy_threshold": self.lazy_threshold,
        }


@dataclass(kw_only=True)
class GaLoreConfig(ProjectedConfig, AdamWConfig):
    name: str = "galore"
    lr: float = 1e-2
    compat: Compat = Compat.torch
    """torch: eps after the bias correction, decay before the update. authors: galore-torch step for step
    (eps before the correction, decay after the update, refresh=svd). Their default is eps=1e-6."""

    def combination_problems(self) -> list[str]:
        found = super().combination_problems()
        return found + self.compat_problems("svd") if self.compat is Compat.authors else found

    def options(self) -> dict[str, Any]:
        return super().options() | {"compat": self.compat.value}


@dataclass(kw_only=True)
class GaLore8bitConfig(GaLoreConfig):
    name: str = "galore_8bit"
    states: States = States.int8


@dataclass(kw_only=True)
class GaLoreAdafactorConfig(ProjectedConfig, AdafactorConfig):
    name: str = "galore_adafactor"
    lr: float = 1e-2

    def combination_problems(self) -> list[str]:
        found = super().combination_problems()
        if self.on_refresh is OnRefresh.rotate:
            found.append(
                "optim.on_refresh=rotate: factored moments cannot be turned; use keep, sign, procrustes or reset"
            )
        return found


@dataclass(kw_only=True)
class FiraConfig(ProjectedConfig, AdamWConfig):
    name: str = "fira"
    lr: float = 1e-2


@dataclass(kw_only=True)
class ApolloConfig(ProjectedConfig, AdamWConfig):
    name: str = "apollo"
    lr: float = 1e-2
    scale: float = 1.0
    """The update is scaled by its square root, as in the authors' code; the weight decay is not."""
    refresh: Refresh = Refresh.random
    scale_type: ScaleType = ScaleType.channel
    """What shares a scale: each channel, or the whole matrix (`tensor`, for rank 1)."""
    compat: Compat = Compat.torch
    """torch: eps after the bias correction, decay before the update, bases drawn by parameter name. authors:
    apollo-torch step for step, its seeds by position included (refresh=random or svd). Their default is eps=1e-6."""

    def combination_problems(self) -> list[str]:
        if self.compat is Compat.authors:
            return self.compat_problems("svd" if self.refresh is Refresh.svd else "random")
        found = self.regenerate_problems()
        if self.refresh is not Refresh.random:
            return found
        if self.on_refresh not in (OnRefresh.keep, OnRefresh.reset):
            found.append(
                f"optim.on_refresh={self.on_refresh.value}: a new random basis has nothing to do with the old one; use "
                "keep or reset, or optim.refresh=warm"
            )
        if self.lazy:
            found.append("optim.lazy=true: random bases do not settle; use optim.lazy=false, or optim.refresh=warm")
        return found

    def options(self) -> dict[str, Any]:
        return super().options() | {"compat": self.compat.value}

    def target_options(self) -> dict[str, Any]:
        return super().target_options() | {"scale_type": self.scale_type.value}


@dataclass(kw_only=True)
class ApolloMiniConfig(ApolloConfig):
    name: str = "apollo_mini"
    rank: int | None = 1
    scale: float = 128.0
    scale_type: ScaleType = ScaleType.tensor


@dataclass(kw_only=True)
class CosmosConfig(TargetedConfig, AdamWConfig):
    name: str = "cosmos"
    lr: float = 1e-2
    rank: int | None = 64
    betas: list[float] = field(default_factory=lambda: [0.95, 0.95])
    lr_ratio: float = 0.1
    """A target moves by lr lr_ratio per value and step; everything else by AdamW at lr."""
    gamma: float = 0.2
    """Weight of the orthogonalised rest against the leading eigenspace."""

    def problems(self) -> list[str]:
        found = super().problems() + finite("lr_ratio", self.lr_ratio, above=0)
        return found + finite("gamma", self.gamma, least=0)

    def target_options(self) -> dict[str, Any]:
        return super().target_options() | {"lr_ratio": self.lr_ratio, "gamma": self.gamma}
