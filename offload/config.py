"""What happens to saved activations, and which bytes leave the device."""

from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """What becomes of a block's saved activations."""

    keep = "keep"
    recompute = "recompute"


class StatePlace(Enum):
    """Where optimizer states live."""

    none = "none"


@dataclass(kw_only=True)
class ActivationsConfig:
    fate: Fate = Fate.keep
    """`keep`: as autograd saves them. `recompute`: each block keeps its input and runs again in backward."""

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True)
class OffloadConfig:
    states: StatePlace = StatePlace.none
    """Where optimizer states live. `none`: on the device that trains."""

    def problems(self) -> list[str]:
        return []
