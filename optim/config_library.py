"""Options of other packages' optimizers, by name."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar

from optim.config_base import AdamWConfig, OptimConfig, States


@dataclass(kw_only=True)
class LibraryConfig(OptimConfig):
    kind: ClassVar[str]
    """The package's own class."""
    package: ClassVar[str]

    def problems(self) -> list[str]:
        found = super().problems()
        own = type(self).states
        if self.states is not own:
            ours = {States.int8: "adamw_8bit", States.int4: "adamw_4bit", States.fp8: "adamw_fp8"}
            other = ours.get(self.states, f"adamw optim.states={self.states.value}")
            found.append(
                f"optim.states={self.states.value}: {self.package}'s {self.kind} keeps {own.value} states; leave it "
                f"out, or use optim={other}"
            )
        if importlib.util.find_spec(self.package) is None:
            found.append(f"optim={self.name}: needs the package {self.package}; pip install {self.package}")
        return found

    def options(self) -> dict[str, Any]:
        found = super().options() | {"kind": self.kind}
        del found["states"]  # the kind's
        return found


@dataclass(kw_only=True)
class BnbAdamW8bitConfig(LibraryConfig, AdamWConfig):
    name: str = "bnb_adamw_8bit"
    states: States = States.int8
    kind: ClassVar[str] = "AdamW8bit"
    package: ClassVar[str] = "bitsandbytes"


@dataclass(kw_only=True)
class BnbPagedAdamW8bitConfig(BnbAdamW8bitConfig):
    name: str = "bnb_paged_adamw_8bit"
    kind: ClassVar[str] = "PagedAdamW8bit"


@dataclass(kw_only=True)
class BnbPagedAdamWConfig(BnbAdamW8bitConfig):
    name: str = "bnb_paged_adamw"
    states: States = States.fp32
    kind: ClassVar[str] = "PagedAdamW"


@dataclass(kw_only=True)
class BnbLion8bitConfig(LibraryConfig):
    name: str = "bnb_lion_8bit"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Weight of the moment in the step, and its decay rate."""
    states: States = States.int8
    kind: ClassVar[str] = "Lion8bit"
    package: ClassVar[str] = "bitsandbytes"

    def problems(self) -> list[str]:
        found = super().problems()
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            found.append(f"optim.betas={list(self.betas)}: needs two numbers in [0, 1), such as [0.9,0.99]")
        return found

    def options(self) -> dict[str, Any]:
        return super().options() | {"betas": (self.betas[0], self.betas[1])}


@dataclass(kw_only=True)
class BnbPagedLion8bitConfig(BnbLion8bitConfig):
    name: str = "bnb_paged_lion_8bit"
    kind: ClassVar[str] = "PagedLion8bit"


@dataclass(kw_only=True)
class TorchaoAdamW8bitConfig(LibraryConfig, AdamWConfig):
    name: str = "torchao_adamw_8bit"
    states: States = States.int8
    compile: bool = True
    """Whether torch compiles the step, as torchao does: seconds for each shape of a parameter at the first step."""
    kind: ClassVar[str] = "AdamW8bit"
    package: ClassVar[str] = "torchao"

    def options(self) -> dict[str, Any]:
        return super().options() | {"compile": self.compile}


@dataclass(kw_only=True)
class TorchaoAdamW4bitConfig(TorchaoAdamW8bitConfig):
    name: str = "torchao_adamw_4bit"
    states: States = States.int4
    kind: ClassVar[str] = "AdamW4bit"


@dataclass(kw_only=True)
class TorchaoAdamWFp8Config(TorchaoAdamW8bitConfig):
    name: str = "torchao_adamw_fp8"
    states: States = States.fp8
    kind: ClassVar[str] = "AdamWFp8"
