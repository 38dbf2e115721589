"""Options every optimizer has, and those of the ones that do not project. Names are those of the authors' packages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar


class States(Enum):
    """How moments are kept between two steps."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


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


def finite(name: str, value: float, *, above: float | None = None, least: float | None = None) -> list[str]:
    """Report an option that is no finite number above `above`, or of at least `least`."""
    fits = value > above if above is not None else least is None or value >= least
    if fits and value < float("inf"):
        return []
    limit = f"above {above:g}" if above is not None else f"of at least {least:g}"
    return [f"optim.{name}={value}: must be a finite number {limit}"]


@dataclass(kw_only=True)
class OptimConfig:
    int8_weights: ClassVar[bool] = False
    """Whether the method is one for weights in int8 (precision.weights=int8_sr), which all others take too."""
    int8_group: ClassVar[int] = 256
    """Neighbours in a row that share a scale where the user does not say."""
    name: str = "adamw"
    """Set by `optim=...`: which optimizer."""
    lr: float = 1e-3
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: float = 0.0
    """Decoupled decay (AdamW), applied to the weights before the update."""
    decay_vectors: bool = False
    """Whether norms, biases and other tensors of one dimension decay too."""
    states: States = States.fp32
    """How moments are kept: fp32; bf16; int8 (bitsandbytes' code book, blocks of 256); int4 (torchao's, blocks of 128);
    fp8 (E4M3 with COAT's range expansion, groups of 128). Small tensors and vectors stay fp32, as does the math."""

    in_backward: bool = False
    """Step each parameter, and free its gradient, as soon as backward has completed it: gradients never exist all at
    once. Over micro-steps they have to add up; of GaLore's matrices only projections do, between two refreshes and
    without train.clip_by=parameter or previous."""

    def problems(self) -> list[str]:
        return finite("lr", self.lr, least=0) + finite("weight_decay", self.weight_decay, least=0)

    def options(self) -> dict[str, Any]:
        """Group keys that every parameter takes."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "states": self.states.value}

    def rules(self) -> list[Rule]:
        """Parameters treated in a special way; the first rule that fits wins."""
        return []


@dataclass(kw_only=True)
class AdamWConfig(OptimConfig):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment (torch's placement)."""

    def problems(self) -> list[str]:
        found = super().problems()
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            found.append(f"optim.betas={list(self.betas)}: needs two numbers in [0, 1), such as [0.9,0.999]")
        if not 0 < self.eps < 1:
            found.append(f"optim.eps={self.eps}: must lie between 0 and 1, such as 1e-8")
        return found

    def options(self) -> dict[str, Any]:
        return super().options() | {"betas": (self.betas[0], self.betas[1]), "eps": self.eps}


@dataclass(kw_only=True)
class AdamW8bitConfig(AdamWConfig):
    name: str = "adamw_8bit"
    states: States = States.int8


@dataclass(kw_only=True)
class AdamW4bitConfig(AdamWConfig):
    name: str = "adamw_4bit"
    states: States = States.int4


@dataclass(kw_only=True)
class AdamWFp8Config(AdamWConfig):
    name: str = "adamw_fp8"
    states: States = States.fp8


@dataclass(kw_only=True)
class SGDConfig(OptimConfig):
    name: str = "sgd"
    lr: float = 1e-2
    momentum: float = 0.9
    """Decay rate of the sum of gradients that the weights move along."""

    def problems(self) -> list[str]:
        bad = not 0 <= self.momentum < 1
        return super().problems() + ([f"optim.momentum={self.momentum}: must lie in [0, 1)"] if bad else [])

    def options(self) -> dict[str, Any]:
        return super().options() | {"momentum": self.momentum}


@dataclass(kw_only=True)
class AdafactorConfig(OptimConfig):
    name: str = "adafactor"
    beta1: float = 0.9
    """Decay rate of the first moment; 0 keeps none."""
    decay_rate: float = 0.8
    """The second moment decays at 1 - t^-decay_rate at step t."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update before the learning rate."""

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 <= self.beta1 < 1:
            found.append(f"optim.beta1={self.beta1}: must lie in [0, 1); 0 keeps no first moment")
        found += finite("decay_rate", self.decay_rate, above=0)
        return found + finite("clip_threshold", self.clip_threshold, above=0)

    def options(self) -> dict[str, Any]:
        own = {"beta1": self.beta1, "decay_rate": self.decay_rate, "clip_threshold": self.clip_threshold}
        return super().options() | own


def names_of(configs: Sequence[type[OptimConfig]]) -> dict[str, type[OptimConfig]]:
    """The dataclasses by the name each has in `optim.name`."""
    return {config().name: config for config in configs}
