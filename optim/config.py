"""One dataclass per optimizer, and the schedule. Nothing here imports torch."""

from dataclasses import dataclass
from enum import Enum

from optim.config_base import (
    AdafactorConfig,
    AdamW4bitConfig,
    AdamW8bitConfig,
    AdamWConfig,
    AdamWFp8Config,
    OptimConfig,
    Rule,
    SGDConfig,
    States,
    names_of,
)
from optim.config_library import (
    BnbAdamW8bitConfig,
    BnbLion8bitConfig,
    BnbPagedAdamW8bitConfig,
    BnbPagedAdamWConfig,
    BnbPagedLion8bitConfig,
    LibraryConfig,
    TorchaoAdamW4bitConfig,
    TorchaoAdamW8bitConfig,
    TorchaoAdamWFp8Config,
)
from optim.config_lowrank import (
    DEFAULT_TARGETS,
    ApolloConfig,
    ApolloMiniConfig,
    Basis,
    Compat,
    CosmosConfig,
    FiraConfig,
    GaLore8bitConfig,
    GaLoreAdafactorConfig,
    GaLoreConfig,
    OnRefresh,
    Products,
    ProjType,
    Refresh,
    ScaleType,
)
from optim.config_quantized import QApolloConfig, QApolloMiniConfig, QGaLoreConfig

__all__ = [
    "CONFIGS", "DEFAULT_TARGETS", "AdafactorConfig", "AdamW4bitConfig", "AdamW8bitConfig", "AdamWConfig",
    "AdamWFp8Config", "ApolloConfig", "ApolloMiniConfig", "Basis", "Compat", "CosmosConfig", "FiraConfig",
    "GaLore8bitConfig", "GaLoreAdafactorConfig", "GaLoreConfig", "LibraryConfig", "OnRefresh", "OptimConfig",
    "Products", "ProjType", "QApolloConfig", "QApolloMiniConfig", "QGaLoreConfig", "Refresh", "Rule",
    "SGDConfig", "ScaleType", "ScheduleConfig", "ScheduleName", "States",
]  # fmt: skip

CONFIGS: dict[str, type[OptimConfig]] = names_of(
    [AdamWConfig, AdamW8bitConfig, AdamW4bitConfig, AdamWFp8Config, SGDConfig, AdafactorConfig, GaLoreConfig,
     GaLore8bitConfig, GaLoreAdafactorConfig, QGaLoreConfig, ApolloConfig, ApolloMiniConfig, QApolloConfig,
     QApolloMiniConfig, FiraConfig, CosmosConfig,
     BnbAdamW8bitConfig, BnbPagedAdamW8bitConfig, BnbPagedAdamWConfig, BnbLion8bitConfig, BnbPagedLion8bitConfig,
     TorchaoAdamW8bitConfig, TorchaoAdamW4bitConfig, TorchaoAdamWFp8Config]
)  # fmt: skip
"""Every optimizer by the name it has in `optim.name`."""


class ScheduleName(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


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
        elif self.decay != ScheduleConfig.decay and self.name is not ScheduleName.wsd:
            found.append(
                f"schedule.decay={self.decay}: has no effect with schedule={self.name.value}; use schedule=wsd"
            )
        if self.floor != ScheduleConfig.floor and self.name is ScheduleName.constant:
            found.append(
                f"schedule.floor={self.floor}: has no effect with schedule=constant; use schedule=linear or cosine"
            )
        return found
